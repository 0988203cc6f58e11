from pathlib import Path

import pytest

from bitscape.cost.policy_cost import policy_cost
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.report.inputs import read_inputs
from bitscape.report.material import Material
from tests.report.made import LAYERS, latency, network, policy, searched


def material(folder: Path, *policies: Policy, **more: object) -> Material:
    paths = [folder / f"{at}.json" for at in range(len(policies))]
    for path, each in zip(paths, policies, strict=True):
        each.save(path)
    return Material(inputs=read_inputs([*paths, *more.pop("files", ())]), **more)


def test_costs_are_counted_where_the_network_is_known_and_else_as_saved(tmp_path: Path) -> None:
    assert material(tmp_path, searched()).costs(searched()) == searched().cost
    known = material(tmp_path, searched(), network=network())
    assert known.costs(searched()) == policy_cost(network(), searched())
    assert known.eight_bits == policy_cost(network(), uniform_policy(LAYERS, LayerBits(8, 8)))


def test_layers_stand_in_call_order(tmp_path: Path) -> None:
    assert list(material(tmp_path, policy()).in_call_order(policy())) == ["first", "second", "third", "last"]
    assert list(material(tmp_path, policy(), network=network()).in_call_order(policy())) == ["first", "third", "second", "last"]


def test_a_policy_or_a_table_that_does_not_fit_the_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(BitscapeError, match=r"0.json: the network has no layer 'conv'"):
        material(tmp_path, Policy({"conv": LayerBits(4, 4)}), network=network())
    table = tmp_path / "table.json"
    latency(input_shape=(1, 8, 8)).save(table)
    with pytest.raises(BitscapeError, match=r"table.json: latency table: it is of images of 1x8x8"):
        material(tmp_path, policy(), files=[table], network=network())


def test_a_latency_table_adds_its_cost_where_it_has_the_bits(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    latency().save(table)
    known = material(tmp_path, policy(), files=[table], network=network())
    assert known.eight_bits["latency_ms"] == pytest.approx(2.5)
    assert "latency_ms" not in known.costs(policy())  # 2/4 was not measured


def test_the_title_is_of_the_network(tmp_path: Path) -> None:
    assert material(tmp_path, searched()).title == "Quantization report: Net"
    assert material(tmp_path, searched(), model="timm:resnet18").title == "Quantization report: resnet18"
    assert material(tmp_path, policy()).title == "Quantization report"
