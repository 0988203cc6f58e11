from typing import Any

import pytest
import torch
from torch import nn

from bitscape.cost.policy_cost import cost
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches import choices
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.freedom import Pins
from bitscape.searches.problem import SearchProblem
from bitscape.searches.uniform import Uniform
from tests.searches.small import square


def problem(budget: Any, **changes: Any) -> SearchProblem:
    convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *convs[:2], nn.MaxPool2d(2), *convs[2:], nn.Flatten(), nn.Linear(72, 4))
    return SearchProblem.of(model=model, samples=torch.zeros(1, 3, 8, 8), budget=budget, **changes)


def free_bits(stated: SearchProblem, method: Uniform) -> set[str]:
    policy = method.search(stated).policy
    policy.check(stated.network.shapes)
    return {str(policy.layers[name]) for name in stated.free_layers}


@pytest.mark.parametrize(
    ("budget", "bits"),
    [
        ("bitops=w4a4", "4/4"),
        ("bitops=0.999x", "6/6"),
        ("bitops=1x", "8/8"),
        ("weight_bytes=w3", "3/8"),
        ("mean_weight_bits=5", "5/8"),
        ("mean_activation_bits=w5a5", "8/5"),
        (["weight_bytes=w5", "bitops=w3a3"], "3/3"),
        (["weight_bytes=w5", "peak_activation_bytes=1MB"], "5/8"),
        (["weight_bytes=w4", "mean_activation_bits=w6a6"], "4/6 4/8"),  # the head keeps its activations
        (["mean_weight_bits=w3", "peak_activation_bytes=w5a5"], "3/5 3/8"),
    ],
)
def test_the_largest_width_that_fits(budget: Any, bits: str) -> None:
    assert free_bits(problem(budget), Uniform()) == set(bits.split())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_bytes_of_some_bits_in_every_layer_are_met_by_these_bits_in_every_layer(bits: int) -> None:
    result = Uniform().search(problem(f"{bits}bit"))
    assert set(map(str, result.policy.layers.values())) == {f"{bits}/8"}
    assert result.policy.cost["weight_bytes"] == result.policy.provenance["budget"]["weight_bytes"]
    assert result.policy.provenance["pinned"] == {"0": "8/8" if bits == 8 else "*/8", "7": "*/8"}


def test_a_first_layer_that_was_pinned_by_hand_keeps_its_bits() -> None:
    policy = Uniform().search(problem("4bit", pinned=Pins({"0": "8/8"}))).policy
    assert str(policy.layers["0"]) == "8/8" and {str(policy.layers[name]) for name in ("1", "2", "4", "5")} == {"3/8"}


@pytest.mark.parametrize("budget", ["bitops=w4a4", "weight_bytes=w3", "mean_activation_bits=w5a5"])
def test_the_exact_cost_of_a_uniform_policy_gives_that_policy_mixed_or_not(budget: str) -> None:
    plain, mixed = (method.search(problem(budget)).policy for method in (Uniform(), Uniform(mix=True)))
    assert plain.layers == mixed.layers


def test_mixing_fills_the_budget_with_low_bits_where_most_macs_are() -> None:
    stated = problem("bitops=0.2x")
    plain, mixed = (method.search(stated).policy for method in (Uniform(), Uniform(mix=True)))
    cap = stated.choices.budget.caps["bitops"]
    assert plain.cost["bitops"] < mixed.cost["bitops"] <= cap
    low = [name for name in stated.free_layers if mixed.layers[name] == plain.layers[stated.free_layers[0]]]
    macs = {name: stated.network.by_name[name].macs for name in stated.free_layers}
    high = [name for name in macs if name not in low]
    assert low and high and min(macs[name] for name in low) >= max(macs[name] for name in high)
    # One low layer fewer would not fit.
    raised = {**mixed.layers, low[-1]: mixed.layers[high[0]]}
    assert cost("bitops", stated.network, type(mixed)(raised)) > cap


def test_tied_layers_are_mixed_together() -> None:
    stated = problem("bitops=0.2x", tied=[("1", "5")])
    policy = Uniform(mix=True).search(stated).policy
    assert policy.layers["1"] == policy.layers["5"]


def test_the_policy_says_how_it_was_found() -> None:
    found = Uniform(mix=True).search(problem("bitops=w4a4", seed=3))
    assert found.policy.provenance["method"] == "uniform"
    assert found.policy.provenance["settings"] == {"mix": True}
    assert found.scores is None and found.seconds >= 0
    assert [step["bits"] for step in found.trace if step["fits"]] == ["2/2", "3/3", "4/4"]


def test_a_budget_below_every_policy_is_infeasible() -> None:
    with pytest.raises(InfeasibleBudget, match="bitops"):
        Uniform().search(problem("bitops=0.01x", pinned={}))


def test_a_budget_that_only_other_policies_meet_is_told_apart() -> None:
    stated = problem("bitops=w2a4", candidates=(LayerBits(2, 4), LayerBits(4, 4)))
    with pytest.raises(BitscapeError, match=r"narrowest uniform policy, 4/4, costs bitops=.*another method") as raised:
        Uniform().search(stated)
    assert not isinstance(raised.value, InfeasibleBudget)


def test_candidates_without_equal_pairs_have_no_uniform_policy_under_bitops() -> None:
    pairs = tuple(bits for bits in square(2, 4) if bits.weight != bits.activation)
    with pytest.raises(BitscapeError, match="none has equal weight and activation bits"):
        Uniform().search(problem("bitops=w4a4", candidates=pairs))
    assert free_bits(problem("weight_bytes=w4", candidates=pairs, pinned={}), Uniform()) == {"4/2"}


def test_caps_on_weights_and_activations_apart_are_filled_apart() -> None:
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    stated = SearchProblem.of(model=model, samples=torch.zeros(1, 3, 8, 8), budget=["weight_bytes=w4", "mean_activation_bits=6"], pinned={})
    assert set(Uniform().search(stated).policy.layers.values()) == {LayerBits(4, 6)}


def test_a_budget_that_the_fewest_bits_keep_needs_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = problem("bitops=0.25x").choices
    monkeypatch.setattr(choices, "solve", None)
    assert stated.holds(stated.narrowest())
    stated.check_feasible()


def test_a_budget_that_the_fewest_weight_bits_break_can_still_be_kept() -> None:
    pairs = (LayerBits(2, 8), LayerBits(3, 2))
    stated = problem("bitops=w3a2", candidates=pairs).choices
    assert not stated.holds(stated.narrowest())
    stated.check_feasible()
