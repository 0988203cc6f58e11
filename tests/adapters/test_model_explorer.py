import numpy as np
import pytest
import torch

import bitscape as bs
from bitscape import adapters
from bitscape.models.digits import digits_net
from bitscape.searches.scores import ScoreTable
from tests.cli.run import MIXED


@pytest.fixture(scope="module")
def program():
    return torch.export.export(digits_net().eval(), (torch.zeros(1, 1, 8, 8),))


def test_every_layer_s_node_shows_its_bits(program):
    data = adapters.to_model_explorer(MIXED, program)
    assert data["name"] == "weight bits"
    shown = {name: node["value"] for name, node in data["results"].items()}
    assert list(shown.values()) == [bits.weight for bits in MIXED.layers.values()]
    assert list(shown)[:2] == ["conv2d", "conv2d_1"]
    activations = adapters.to_model_explorer(MIXED, program, value="activation")["results"]
    assert [node["value"] for node in activations.values()] == [
        bits.activation for bits in MIXED.layers.values()
    ]


def test_scores_are_those_of_the_policy_s_bits(program):
    free = tuple(name for name, bits in MIXED.layers.items() if bits.activation == 4)
    candidates = tuple(bs.LayerBits(bits, 4) for bits in range(2, 9))
    values = np.arange(len(free) * len(candidates)).reshape(len(free), -1)
    scores = ScoreTable(free, candidates, values, "fisher")
    shown = adapters.to_model_explorer(MIXED, program, value="score", scores=scores)["results"]
    expected = [values[row, MIXED.layers[name].weight - 2] for row, name in enumerate(free)]
    assert [node["value"] for node in shown.values()] == expected
    others = ScoreTable(free, candidates[-1:], values[:, -1:], "fisher")
    with pytest.raises(bs.BitscapeError, match=r"scores: none of layer '.*' at ./4 bits"):
        adapters.to_model_explorer(MIXED, program, value="score", scores=others)


def test_what_cannot_be_shown_is_refused(program):
    with pytest.raises(
        bs.BitscapeError, match="value='bits': use one of weight, activation, score"
    ):
        adapters.to_model_explorer(MIXED, program, value="bits")
    with pytest.raises(bs.BitscapeError, match="needs scores"):
        adapters.to_model_explorer(MIXED, program, value="score")
    with pytest.raises(bs.BitscapeError, match="program: no node of layer 'stem'"):
        adapters.to_model_explorer(bs.Policy({"stem": bs.LayerBits.EIGHT}), program)


def test_model_explorer_reads_it_and_has_these_nodes(program):
    builder = pytest.importorskip(
        "model_explorer.node_data_builder", reason="ai-edge-model-explorer is not installed"
    )
    from model_explorer.pytorch_exported_program_adapter_impl import (
        PytorchExportedProgramAdapterImpl,
    )

    data = adapters.to_model_explorer(MIXED, program)
    fields = {name: builder.NodeDataResult(**node) for name, node in data["results"].items()}
    gradient = [builder.GradientItem(**stop) for stop in data["gradient"]]
    read = builder.GraphNodeData(results=fields, name=data["name"], gradient=gradient)
    assert '"weight bits"' in read.to_json_string()
    settings = {"const_element_count_limit": 16}
    (graph,) = PytorchExportedProgramAdapterImpl(program, settings).convert()["graphs"]
    labels = {node.id: node.label for node in graph.nodes}
    assert {labels[name] for name in data["results"]} == {"aten.conv2d", "aten.linear"}
