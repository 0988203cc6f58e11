import pytest
import torch

from bitscape.cost.layers import NetworkProfile
from bitscape.cost.policy_cost import policy_cost
from bitscape.dynamic.decision import Decision, joined
from bitscape.policy import LayerBits, Policy
from tests.searches.small import layer, network, random_network


def drawn(cost: NetworkProfile, images: int = 5, seed: int = 0) -> Decision:
    generator = torch.Generator().manual_seed(seed)
    weight, activation = torch.randint(1, 9, (2, images, len(cost.layers)), generator=generator).float()
    return Decision(weight, activation)


def policy_at(cost: NetworkProfile, decision: Decision, image: int) -> Policy:
    pairs = zip(decision.weight[image].int().tolist(), decision.activation[image].int().tolist(), strict=True)
    return Policy({name: LayerBits(*pair) for name, pair in zip(cost.by_name, pairs, strict=True)})


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_of_the_policy_of_each_image(seed: int) -> None:
    cost = random_network(6, seed)
    decision = drawn(cost, seed=seed)
    found = zip(decision.bitops(cost).tolist(), decision.activation_bits(cost).tolist(), strict=True)
    for at, (bitops, bits) in enumerate(found):
        expected = policy_cost(cost, policy_at(cost, decision, at))
        assert bitops == pytest.approx(expected["bitops"], rel=1e-6)  # float32
        assert bits == pytest.approx(expected["mean_activation_bits"], rel=1e-6)


def test_costs_by_hand() -> None:
    cost = network(layer("a", macs=10, inputs=30), layer("b", macs=100, inputs=10))
    decision = Decision(torch.tensor([[8.0, 2], [4, 4]]), torch.tensor([[8.0, 3.5], [2, 6]]))
    assert decision.bitops(cost).tolist() == [640 + 700, 80 + 2400]
    assert decision.activation_bits(cost).tolist() == [(30 * 8 + 10 * 3.5) / 40, (30 * 2 + 10 * 6) / 40]


def test_the_slope_of_the_cost_is_macs_times_the_other_width() -> None:
    cost = network(layer("a", macs=10), layer("b", macs=100))
    weight, activation = torch.tensor([[8.0, 2]]).requires_grad_(), torch.tensor([[7.0, 3]]).requires_grad_()
    Decision(weight, activation).bitops(cost).sum().backward()
    assert weight.grad is not None and activation.grad is not None
    assert weight.grad.tolist() == [[70, 300]] and activation.grad.tolist() == [[80, 200]]


def test_rows_joining_rounding_and_detaching() -> None:
    cost = random_network(3, 0)
    whole = drawn(cost, images=7)
    assert len(whole) == 7
    parts = [whole[slice(0, 2)], whole[torch.tensor([2, 3])], whole[torch.arange(7) > 3]]
    assert [len(part) for part in parts] == [2, 2, 3]
    again = joined(parts)
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.activation, whole.activation)
    between = Decision(whole.weight + 0.4, (whole.activation - 0.4).requires_grad_())
    assert torch.equal(between.rounded().weight, whole.weight) and torch.equal(between.rounded().activation, whole.activation)
    left = between.detach()
    assert not left.activation.requires_grad and torch.equal(left.activation, between.activation)
