import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitscape.cost.layers import LayerCost, NetworkProfile, idle_layer, measure
from bitscape.cost.policy_cost import (
    CAPS,
    bitops,
    cost,
    layer_cost,
    limit,
    mean_activation_bits,
    mean_weight_bits,
    peak_activation_bytes,
    policy_cost,
    weight_bytes,
)
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy, uniform_policy
from tests.networks import mobilenetv2, resnet18, resnet20, resnet50

COUNTED = {kind: row for kind, row in CAPS.items() if not row.measured}
"""The costs that follow from the network alone; for the measured one see test_latency."""
WIDTHS = st.integers(1, 8)
BITS = st.builds(LayerBits, WIDTHS, WIDTHS)
SIZES = st.integers(1, 10**9)
LAYERS = st.builds(
    LayerCost,
    name=st.just("layer"),
    kind=st.just("Conv2d"),
    macs=SIZES,
    weights=SIZES,
    weight_shape=st.just((1,)),
    scales=st.integers(1, 4096),
    input_elements=SIZES,
    output_elements=SIZES,
)


@st.composite
def networks_and_policies(draw) -> tuple[NetworkProfile, Policy]:
    layers = draw(st.lists(LAYERS, min_size=1, max_size=6))
    named = tuple(LayerCost(**{**layer.__dict__, "name": f"layer{index}"}) for index, layer in enumerate(layers))
    network = NetworkProfile(layers=named, input_shape=(3, 8, 8))
    return network, Policy({layer.name: draw(BITS) for layer in named})


@pytest.mark.parametrize(
    ("build", "size", "bits", "published_g"),
    [
        (resnet18, 224, 4, 34.71),
        (resnet18, 224, 3, 22.85),
        (resnet18, 224, 2, 14.37),
        (resnet50, 224, 4, 71.19),
        (resnet50, 224, 3, 43.41),
        (resnet50, 224, 2, 23.56),
        (mobilenetv2, 224, 4, 5.39),
        (mobilenetv2, 224, 3, 3.37),
        (mobilenetv2, 224, 2, 1.93),
        (resnet20, 32, 4, 0.6746),
        (resnet20, 32, 3, 0.3921),
    ],
)
def test_published_bitops(build, size, bits, published_g):
    with torch.device("meta"):
        network = measure(build(), (3, size, size))
    pinned = dict.fromkeys(network.ends, LayerBits(8, 8))
    policy = uniform_policy(network.by_name, LayerBits(bits, bits), pinned)
    digits = 4 if published_g < 1 else 2
    assert round(bitops(network, policy) / 1e9, digits) == published_g


def test_costs_by_hand():
    network = measure(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4, 7)), (3, 4, 4))
    policy = Policy({"0": LayerBits(8, 8), "2": LayerBits(3, 5)})
    assert policy_cost(network, policy) == {
        "bitops": 540 * 64 + 140 * 15,
        # 135 weights of 8 bits = 34 words; 140 weights of 3 bits = 14 words; 5 + 7 scales.
        "weight_bytes": 34 * 4 + 14 * 4 + 12 * 4,
        "mean_weight_bits": (135 * 8 + 140 * 3) / 275,
        "mean_activation_bits": (48 * 8 + 20 * 5) / 68,
        "peak_activation_bytes": 48 + 20,
    }
    assert bitops(network, policy) == policy_cost(network, policy)["bitops"]
    assert weight_bytes(network, policy) == policy_cost(network, policy)["weight_bytes"]
    assert mean_weight_bits(network, policy) == policy_cost(network, policy)["mean_weight_bits"]
    assert mean_activation_bits(network, policy) == policy_cost(network, policy)["mean_activation_bits"]
    assert peak_activation_bytes(network, policy) == policy_cost(network, policy)["peak_activation_bytes"]


@given(LAYERS, BITS, st.sampled_from(["weight", "activation"]))
def test_no_cost_falls_when_bits_rise(layer, bits, side):
    more = LayerBits(min(8, bits.weight + (side == "weight")), min(8, bits.activation + (side == "activation")))
    for kind, row in COUNTED.items():
        before, after = layer_cost(kind, layer, bits), layer_cost(kind, layer, more)
        assert before <= after
        if side not in row.depends_on:
            assert before == after


@given(LAYERS, BITS)
def test_packed_bytes_are_whole_words_and_waste_less_than_one(layer, bits):
    packed = layer_cost("weight_bytes", layer, bits) - 4 * layer.scales
    assert packed % 4 == 0
    assert 0 <= 8 * packed - layer.weights * bits.weight < 32


@given(networks_and_policies())
def test_network_cost_combines_the_layers(case):
    network, policy = case
    for kind, row in COUNTED.items():
        parts = [layer_cost(kind, layer, policy.layers[layer.name]) for layer in network.layers]
        assert all(type(part) is int for part in parts)
        combined = sum(parts) if row.combine == "sum" else max(parts)
        assert cost(kind, network, policy) == pytest.approx(combined / row.denominator(network), rel=1e-15)


@given(networks_and_policies(), st.floats(0.5, 2))
def test_limit_admits_exactly_the_policies_within_the_budget(case, factor):
    network, policy = case
    for kind, row in COUNTED.items():
        combined = row.combined(layer_cost(kind, layer, policy.layers[layer.name]) for layer in network.layers)
        value = cost(kind, network, policy)
        assert combined <= limit(kind, network, value)
        assert (combined <= limit(kind, network, value * factor)) == (value <= value * factor)


@given(networks_and_policies())
def test_limit_just_below_a_cost_refuses_it(case):
    network, policy = case
    for kind, row in COUNTED.items():
        combined = row.combined(layer_cost(kind, layer, policy.layers[layer.name]) for layer in network.layers)
        assert combined > limit(kind, network, math.nextafter(cost(kind, network, policy), 0))


def test_limit_of_an_absurd_budget_is_found_at_once():
    network = measure(nn.Linear(7, 3), (7,))
    assert limit("mean_weight_bits", network, 1.7e308) >= 21 * 10**308
    assert limit("bitops", network, 1.7e308) == int(1.7e308)


@given(WIDTHS, WIDTHS)
def test_mean_bits_of_a_uniform_policy_are_its_bits(weight, activation):
    network = measure(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 1)), (3, 4, 4))
    policy = uniform_policy(network.by_name, LayerBits(weight, activation))
    assert mean_weight_bits(network, policy) == weight
    assert mean_activation_bits(network, policy) == activation


def test_policy_must_fit_the_network():
    network = measure(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 1)), (3, 4, 4))
    with pytest.raises(BitscapeError, match="names layer '2'"):
        bitops(network, Policy(dict.fromkeys(("0", "1", "2"), LayerBits(4, 4))))
    with pytest.raises(BitscapeError, match="no bits for layer '1'"):
        bitops(network, Policy({"0": LayerBits(4, 4)}))


def test_never_called_layers_may_have_bits_and_cost_what_is_stored():
    with_uncalled = NetworkProfile(
        layers=measure(nn.Linear(4, 4), (4,)).layers,
        never_called=(idle_layer("idle", nn.Linear(4, 4)),),
        input_shape=(4,),
    )
    name = with_uncalled.layers[0].name
    alone, both = Policy({name: LayerBits(4, 4)}), Policy({name: LayerBits(4, 4), "idle": LayerBits(8, 8)})
    less, more = policy_cost(with_uncalled, alone), policy_cost(with_uncalled, both)
    assert more["weight_bytes"] - less["weight_bytes"] == 4 * 4 + 4 * 4
    assert more["mean_weight_bits"] == 6.0
    assert all(more[kind] == less[kind] for kind in less if kind not in ("weight_bytes", "mean_weight_bits"))


def test_shared_weight_has_one_width_and_is_stored_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    network = measure(model, (8,))
    assert weight_bytes(network, uniform_policy(network.by_name, LayerBits(4, 4))) == 32 + 32
    assert weight_bytes(network, Policy({"0": LayerBits(4, 4), "1": LayerBits(4, 8)})) == 32 + 32
    with pytest.raises(BitscapeError, match=r"shared weight several widths \(0 4, 1 8 bits\)"):
        weight_bytes(network, Policy({"0": LayerBits(4, 4), "1": LayerBits(8, 4)}))


def test_unknown_kind_names_the_nearest():
    layer = measure(nn.Linear(4, 4), (4,)).layers[0]
    with pytest.raises(BitscapeError, match=r"'bitop' is unknown.*nearest: bitops"):
        layer_cost("bitop", layer, LayerBits(4, 4))
