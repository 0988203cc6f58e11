import copy
import logging
from functools import cache

import pytest
import torch
from torch import Tensor

from bitscape.cost.policy_cost import policy_cost
from bitscape.dynamic.network import DynamicBits, DynamicNetwork, decide
from bitscape.dynamic.tiers import Gate, TieredNetwork, distill_tiers
from bitscape.engine.spending import Spending, noting_spent
from bitscape.errors import BitscapeError
from bitscape.quant.layers import QuantConv2d, QuantLinear, quantized_layers, static_bits
from tests.dynamic.small import NAMES, dynamic, mixed_images, policy_of, set_heads

RESIDUAL, MEAN = 1, 3
"""Places of features that heads see."""
WEIGHTS = DynamicBits(weights=True)


@cache
def _built(bits: DynamicBits) -> DynamicNetwork:
    return dynamic(bits)


def deciding_by(feature: int, *, slope: float, middle: float, bits: DynamicBits | None = None) -> DynamicNetwork:
    """Every width is slope * feature + middle."""
    network = copy.deepcopy(_built(bits or DynamicBits()))
    set_heads(network, middle=middle)
    with torch.no_grad():
        for head in network.heads:
            head.center.zero_()
            head.spread.fill_(1.0)
            head.linear.weight[: len(head.linear.bias) // 2, feature] = slope
    return network


def by_noise(bits: DynamicBits | None = None) -> DynamicNetwork:
    """2 bits for clean images, 8 for noisy ones: residuals are below 0.25 and above 0.6."""
    return deciding_by(RESIDUAL, slope=1000.0, middle=-400.0, bits=bits)


def graded_images(count: int) -> tuple[Tensor, Tensor]:
    """Clean, noisy and very noisy images in turn, and which (0, 1, 2)."""
    grade = torch.arange(count) % 3
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return 0.3 * mixed_images(2 * count)[::2] + noise * torch.tensor([0.0, 1.0, 2.0])[grade].view(-1, 1, 1, 1), grade


def activation_bits(tiers: TieredNetwork) -> list[list[int]]:
    return [[policy.layers[name].activation for name in NAMES] for policy in tiers.policies]


def mean_cost(network: DynamicNetwork, images: Tensor) -> float:
    return float(decide(network, images).bitops(network.cost).double().mean())


# Qualities that part clearly


@pytest.mark.parametrize("count", [11, 16, 31, 50, 131])
def test_two_qualities_become_two_tiers_exactly(count: int) -> None:
    network, images = by_noise(), mixed_images(count)
    tiers = distill_tiers(network, images, 2)
    tiers(images)
    assert torch.equal(tiers.tiers, torch.arange(count) % 2)
    assert activation_bits(tiers) == [[8, 2, 2, 8], [8, 8, 8, 8]]
    assert float((tiers.spent.bitops - tiers.gate_bitops).double().mean()) == pytest.approx(mean_cost(network, images))


def test_unseen_images_are_routed_alike() -> None:
    tiers = distill_tiers(by_noise(), mixed_images(64), 2)
    tiers(mixed_images(100, seed=7))
    assert torch.equal(tiers.tiers, torch.arange(100) % 2)


@pytest.mark.parametrize("bits", [DynamicBits(), WEIGHTS], ids=["inputs", "weights too"])
def test_three_qualities_become_three_tiers(bits: DynamicBits) -> None:
    images, grade = graded_images(150)
    network = deciding_by(RESIDUAL, slope=2.5, middle=2.0, bits=bits)
    tiers = distill_tiers(network, images, 3)
    tiers(images)
    assert torch.equal(tiers.tiers, grade)
    costs = [policy_cost(network.cost, policy)["bitops"] for policy in tiers.policies]
    assert costs == sorted(set(costs))  # cheapest first
    assert float((tiers.spent.bitops - tiers.gate_bitops).double().mean()) <= mean_cost(network, images)
    decision = decide(network, images)
    for tier, policy in enumerate(tiers.policies):
        own = decision[grade == tier]
        for at, name in enumerate(NAMES):
            assert abs(policy.layers[name].activation - float(own.activation[:, at].mean())) <= 1
            assert abs(policy.layers[name].weight - float(own.weight[:, at].mean())) <= 1


@pytest.mark.parametrize("slope", [1.0, 1.7, 2.6])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_tiers_cost_no_more_than_the_dynamic_network(count: int, slope: float) -> None:
    # Qualities without gaps: means are not whole, and the gate errs at the borders.
    noise = torch.linspace(0, 1.5, 120).view(-1, 1, 1, 1) * torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    images = mixed_images(240)[::2] + noise
    network = deciding_by(RESIDUAL, slope=slope, middle=2.4)
    tiers = distill_tiers(network, images, count)
    tiers(images)
    assert 1 < len(tiers.policies) <= count
    assert float((tiers.spent.bitops - tiers.gate_bitops).double().mean()) <= mean_cost(network, images) * (1 + 1e-6)
    assert all(2 <= bits <= 8 for row in activation_bits(tiers) for bits in row)


# What each tier is


@pytest.mark.parametrize("bits", [DynamicBits(), WEIGHTS], ids=["inputs", "weights too"])
def test_tiers_are_ordinary_quantized_networks_of_their_policies(bits: DynamicBits) -> None:
    network = by_noise(bits)
    tiers = distill_tiers(network, mixed_images(40), 2)
    assert len(tiers.networks) == len(tiers.policies) == 2 and not tiers.training
    for made, policy in zip(tiers.networks, tiers.policies, strict=True):
        layers = quantized_layers(made)
        assert {name: static_bits(layer) for name, layer in layers.items()} == policy.layers
        assert {type(layer) for layer in layers.values()} == {QuantConv2d, QuantLinear}
        assert not any(layer._forward_pre_hooks for layer in layers.values())
        for name in (NAMES[0], NAMES[-1]):
            assert policy.layers[name] == policy_of(made).layers[name]
    weights = [[policy.layers[name].weight for name in NAMES[1:-1]] for policy in tiers.policies]
    assert weights == ([[2, 2], [8, 8]] if bits.weights else [[4, 4], [4, 4]])


def test_an_image_gets_the_logits_of_its_own_network() -> None:
    tiers, images = distill_tiers(by_noise(), mixed_images(40), 2), mixed_images(12, seed=2)
    logits = tiers(images)
    for tier, made in enumerate(tiers.networks):
        own = tiers.tiers == tier
        assert int(own.sum()) == 6
        assert torch.equal(logits[own], made(images[own]))
        assert not torch.allclose(logits[~own], made(images[~own]))


def test_a_tier_is_the_dynamic_network_at_its_policy_norms_too() -> None:
    network, images = by_noise(), mixed_images(40)
    tiers = distill_tiers(network, images, 2)
    for made, policy in zip(tiers.networks, tiers.policies, strict=True):
        expected = network.static(policy).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())


def test_spent_is_the_cost_of_the_policy_and_the_gate() -> None:
    network, images = by_noise(), mixed_images(9)
    tiers = distill_tiers(network, mixed_images(40), 2)
    assert isinstance(tiers, Spending)  # before the first batch too
    tiers(images)
    assert tiers.gate_bitops == (9 * 3 * 8 * 8 + 2 * 3) * 64  # 9 passes over the image, three features to two scores, at 8 bits
    costs = [policy_cost(network.cost, policy) for policy in tiers.policies]
    for at, tier in enumerate(tiers.tiers.tolist()):
        assert float(tiers.spent.bitops[at]) == pytest.approx(costs[tier]["bitops"] + tiers.gate_bitops)
        assert float(tiers.spent.bits[at]) == pytest.approx(costs[tier]["mean_activation_bits"])
    assert len(tiers.spent.bits) == len(tiers.spent.bitops) == 9


def test_what_is_noted_tells_the_tier_of_each_image() -> None:
    tiers = distill_tiers(by_noise(), mixed_images(40), 2)
    with noting_spent(tiers) as noted:
        for batch in mixed_images(9).split(4):
            tiers(batch)
    assert [spent.tiers.tolist() for spent in noted] == [[0, 1, 0, 1], [0, 1, 0, 1], [0]]


def test_the_dynamic_network_is_left_alone_and_the_result_repeats() -> None:
    network, images = by_noise().train(), mixed_images(40)
    before = copy.deepcopy(network.state_dict())
    tiers = [distill_tiers(network, images, 2) for _ in range(2)]
    assert network.training and all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert tiers[0].policies == tiers[1].policies
    one, other = (each.state_dict() for each in tiers)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# Qualities that the gate cannot tell


@pytest.mark.parametrize("share", [0.4, 0.6, 0.7])
def test_where_the_gate_errs_tiers_still_keep_the_cost_and_static_bits(share: float) -> None:
    # Heads see an offset of the image, which gradients, residuals and contrast do not.
    images = mixed_images(200) + torch.where(torch.arange(200) < share * 200, 5.0, -5.0).view(-1, 1, 1, 1)
    images = images[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    network = deciding_by(MEAN, slope=1000.0, middle=5.0, bits=DynamicBits(static=("11",)))
    with torch.no_grad():
        for head in network.heads[1:]:  # later layers follow what the first one spent
            head.linear.weight[0] = torch.tensor([0.0, 0, 0, 0, 0, 1000.0])
            head.linear.bias[0] = -1000.0 * 0.5 * network.cost.by_name["0"].macs / network.cost.covered_macs
    assert len(decide(network, images).activation.unique(dim=0)) == 2
    tiers = distill_tiers(network, images, 2)
    tiers(images)
    assert float((tiers.spent.bitops - tiers.gate_bitops).double().mean()) <= mean_cost(network, images) * (1 + 1e-6)
    for made, policy in zip(tiers.networks, tiers.policies, strict=True):
        assert policy.layers["11"] == policy_of(made).layers["11"]
        assert {name: static_bits(layer) for name, layer in quantized_layers(made).items()} == policy.layers


# Decisions that do not differ


@pytest.mark.parametrize("middle", [2.0, 5.0])
def test_one_decision_for_all_is_one_tier(middle: float, caplog: pytest.LogCaptureFixture) -> None:
    network, images = deciding_by(RESIDUAL, slope=0.0, middle=middle), mixed_images(40)
    with caplog.at_level(logging.WARNING, "bitscape.dynamic"):
        tiers = distill_tiers(network, images, 3)
    assert "only 1 form" in caplog.text and "not 3" in caplog.text
    assert activation_bits(tiers) == [[8, int(middle), int(middle), 8]]
    assert torch.equal(tiers(images), tiers.networks[0](images)) and not tiers.tiers.any()


def test_two_decisions_are_two_tiers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bitscape.dynamic"):
        tiers = distill_tiers(by_noise(), mixed_images(40), 4)
    assert "only 2 forms" in caplog.text
    assert activation_bits(tiers) == [[8, 2, 2, 8], [8, 8, 8, 8]]
    caplog.clear()
    distill_tiers(by_noise(), mixed_images(40), 2)
    assert not caplog.records


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_wrong_count_is_explained(count: int) -> None:
    with pytest.raises(BitscapeError, match=f"count = {count}: give 2 to 4 tiers"):
        distill_tiers(by_noise(), mixed_images(8), count)


# The gate alone


def test_the_gate_learns_what_a_line_parts() -> None:
    images, grade = graded_images(90)
    gate = Gate(3)
    gate.fit(images, grade)
    assert torch.equal(gate(images), grade)
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert all(bool(parameter.isfinite().all()) for parameter in gate.parameters())
    copied = Gate(3)
    copied.load_state_dict(gate.state_dict())
    fresh, its_grade = graded_images(120)
    assert torch.equal(copied(fresh), gate(fresh)) and torch.equal(gate(fresh), its_grade)


def test_where_features_say_nothing_the_gate_takes_the_larger_group() -> None:
    images = mixed_images(1).repeat(10, 1, 1, 1)
    gate = Gate(2)
    gate.fit(images, torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1, 1]))
    assert bool((gate(images) == 1).all())


def test_a_statistic_that_varies_little_in_calibration_does_not_decide_alone_when_it_does_later() -> None:
    # All contrasts are alike to 7e-5: by their own deviation an image of twice the contrast would be 40,000 away.
    images = mixed_images(1).repeat(8, 1, 1, 1) * (1 + 1e-5 * torch.arange(8)).view(-1, 1, 1, 1)
    gate, seen = Gate(2), []
    gate.fit(images, torch.arange(8) % 2)
    gate.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    gate(2 * images[:1])
    assert 0 < float(seen[0].abs().max()) < 10


def test_the_gate_is_a_plain_linear_choice() -> None:
    gate = Gate(4)
    assert set(gate.state_dict()) == {"center", "spread", "linear.weight", "linear.bias"}
    assert {name: tuple(parameter.shape) for name, parameter in gate.named_parameters()} == {"linear.weight": (4, 3), "linear.bias": (4,)}
    assert gate(mixed_images(5)).shape == (5,)
