"""Layers that stay float: named, by pattern or by type; searched around, quantized around, and in files."""

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.quant.layers import quantized_layers
from tests.needs import runtime_or_skip
from tests.verbs.test_verbs import IMAGES, classifier

FLOAT = bs.LayerBits.FLOAT
EIGHT_BIT_INPUTS = [bs.LayerBits(weight, 8) for weight in (2, 4, 8)]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.embed(x))
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


def searched(model, keep_float, data=IMAGES, budget="bitops=20x", **settings):
    return bs.search(model, data, budget, candidates=EIGHT_BIT_INPUTS, keep_float=keep_float, count=16, **settings).policy


@pytest.mark.parametrize(
    ("keep_float", "names"),
    [(["7"], {"7"}), (["[03]"], {"0", "3"}), ([nn.Linear], {"7"}), ([nn.Conv2d, "7"], {"0", "3", "7"})],
)
def test_names_patterns_and_types_stay_float(keep_float, names):
    policy = searched(classifier(), keep_float, method="uniform")
    assert {name for name, bits in policy.layers.items() if bits == FLOAT} == names
    assert policy.provenance["pinned"] | dict.fromkeys(names, "float") == policy.provenance["pinned"]


def test_the_layers_inside_a_module_of_a_type_stay_float_and_types_without_layers_name_none():
    tokens = torch.randn(16, 5, 8)
    policy = searched(Attending().eval(), [nn.MultiheadAttention, nn.LayerNorm], tokens, method="uniform")
    assert {name for name, bits in policy.layers.items() if bits == FLOAT} == {f"attend.{part}_proj" for part in ("q", "k", "v", "out")}


@pytest.mark.parametrize(
    ("keep_float", "message"),
    [
        ([nn.LSTM], "keep_float: the network has no LSTM"),
        ([nn.ReLU(), 3], r"keep_float=\[ReLU\(\), 3\]: it must be a list \(each entry a text or a class\)"),
        ("head*", r"keep_float='head\*': it must be a list \(each entry"),
        (nn.Linear, "keep_float=.*Linear.*: it must be a list"),
        (["head*"], r"keep_float: no layer that runs matches 'head\*'"),
    ],
)
def test_mistakes_are_told(keep_float, message):
    with pytest.raises(bs.BitscapeError, match=message):
        searched(classifier(), keep_float, method="uniform")


def test_a_float_layer_is_left_alone_when_the_others_are_quantized(tmp_path):
    model = classifier()
    policy = searched(model, [nn.Linear])
    network = bs.quantize(model, policy, IMAGES, for_training=True)
    assert set(quantized_layers(network)) == {"0", "3"} and type(network[7]) is nn.Linear
    assert torch.equal(network[7].weight, model[7].weight)
    policy.save(tmp_path / "policy.json")
    assert bs.Policy.load(tmp_path / "policy.json").layers["7"] == FLOAT


def test_packed_files_hold_float_weights_as_they_are(tmp_path):
    model = classifier()
    network = bs.quantize(model, searched(model, ["7"]), IMAGES, for_training=True)
    bs.export(network, tmp_path / "network.safetensors")
    loaded = bs.load_packed(tmp_path / "network.safetensors", model)
    assert type(loaded[7]) is nn.Linear and torch.equal(loaded(IMAGES), network(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "runtime"), [(".onnx", "onnxruntime"), (".xml", "openvino")])
@pytest.mark.parametrize("keep_float", [["7"], ["3"]])
def test_files_for_runtimes_compute_float_layers_in_float(keep_float, suffix, runtime, tmp_path):
    runtime_or_skip(runtime)
    model = classifier()
    network = bs.quantize(model, searched(model, keep_float), IMAGES)
    report = bs.export(network, tmp_path / f"network{suffix}", IMAGES)
    assert report.path.is_file()
    assert report.simulated["output0"].same_class == 1.0


def test_types_are_those_of_the_network_before_its_attention_is_split():
    tokens = torch.randn(16, 5, 8)
    policy = searched(Attending().eval(), [nn.MultiheadAttention], tokens, method="uniform", attention_products=True)
    inside = {f"attend.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj", "scores", "values")}
    assert {name for name, bits in policy.layers.items() if bits == FLOAT} == inside
