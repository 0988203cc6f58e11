import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape import adapters
from bitscape.adapters.torchao import torchao_document
from bitscape.models.layers import layer_shapes


def network():
    torch.manual_seed(0)
    layers = {
        "stem": nn.Conv2d(3, 8, 3),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "flatten": nn.Flatten(),
        "hidden": nn.Linear(128, 16),
        "head": nn.Linear(16, 10),
    }
    return nn.Sequential(OrderedDict(layers)).eval()


POLICY = bs.Policy(
    {
        "stem": bs.LayerBits(3, 8),
        "depthwise": bs.LayerBits(4, 8),
        "hidden": bs.LayerBits(2, 8),
        "head": bs.LayerBits.FLOAT,
    }
)


@pytest.fixture(scope="module")
def quantization():
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def test_torchao_gives_each_layer_its_levels(quantization):
    model, images = network().requires_grad_(False), torch.randn(2, 3, 8, 8)
    expected = model(images)
    config = adapters.to_torchao(POLICY, model, rounding="up")
    quantization.quantize_(model, config, filter_fn=None)
    assert model.stem.weight.qdata.unique().tolist() == [*range(-4, 4)]
    assert model.hidden.weight.qdata.unique().tolist() == [*range(-2, 2)]
    assert type(model.depthwise.weight) is type(model.head.weight) is nn.Parameter
    assert 0 < float((model(images) - expected).norm() / expected.norm()) < 1


def test_the_file_is_read_back_by_torchao(quantization):
    core = pytest.importorskip("torchao.core.config")
    config = adapters.to_torchao(POLICY, network(), rounding="up")
    assert core.config_from_dict(json.loads(json.dumps(torchao_document(config)))) == config


def test_what_torchao_lacks_is_refused(quantization):
    with pytest.raises(
        bs.BitscapeError, match=r"layer 'stem': torchao has no 3/8 .* only 1/float, .* here 3/float"
    ):
        adapters.to_torchao(POLICY, network())


def test_a_policy_of_another_network_is_refused():
    with pytest.raises(bs.BitscapeError, match="gives no bits for 'hidden'"):
        adapters.to_torchao(
            bs.Policy({name: POLICY.layers[name] for name in ("stem", "depthwise", "head")}),
            network(),
        )


def test_layers_of_attention_are_no_modules():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    policy = bs.Policy(dict.fromkeys(layer_shapes(model), bs.LayerBits.EIGHT))
    with pytest.raises(bs.BitscapeError, match=r"part of an nn.MultiheadAttention"):
        adapters.to_torchao(policy, model)
