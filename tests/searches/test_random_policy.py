import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.problem import SearchProblem, SearchResult
from bitscape.searches.random_policy import Random
from tests.searches.small import fits

pytestmark = pytest.mark.slow


class Net(nn.Sequential):
    def __init__(self, layers: int = 12) -> None:
        convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers)]
        super().__init__(nn.Conv2d(3, 8, 3), *convs, nn.Flatten(), nn.Linear(8 * 36, 4))


def problem(budget: Any, *, layers: int = 12, **changes: Any) -> SearchProblem:
    return SearchProblem.of(model=Net(layers), samples=torch.zeros(1, 3, 8, 8), budget=budget, **changes)


def usage(stated: SearchProblem, found: SearchResult) -> float:
    return max(found.policy.cost[kind] / cap for kind, cap in stated.choices.budget.caps.items())


BUDGETS = [
    "bitops=w4a4",
    "bitops=0.15x",
    "weight_bytes=w3",
    "mean_activation_bits=w5a5",
    ["bitops=w4a4", "weight_bytes=w3"],
]


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from(BUDGETS))
def test_the_policy_is_within_two_percent_below_the_tightest_cap(seed: int, budget: Any) -> None:
    stated = problem(budget, seed=seed)
    found = Random().search(stated)
    assert fits(stated.network, found.policy, stated.choices.budget)
    assert usage(stated, found) >= 0.98
    found.policy.check(stated.network.shapes)


def test_the_seed_decides_and_seeds_differ() -> None:
    policies = [Random().search(problem("bitops=w4a4", seed=seed)).policy for seed in (0, 0, *range(1, 20))]
    assert policies[0].layers == policies[1].layers
    assert len({tuple(policy.layers.values()) for policy in policies}) == 20
    # Every layer sees narrow and wide pairs: the walk does not settle on one shape.
    free = list(policies[0].layers)[1:-1]
    assert all(len({policy.layers[name] for policy in policies}) >= 8 for name in free)


def test_a_budget_that_only_the_cheapest_policy_meets_gives_it() -> None:
    stated = problem("bitops=w2a2", pinned={})
    assert set(Random().search(stated).policy.layers.values()) == {LayerBits(2, 2)}


def test_tied_and_pinned_layers_are_respected() -> None:
    stated = problem("bitops=w4a4", tied=[("1", "2", "3")], pinned={"4": LayerBits(1, 1)})
    bits = Random().search(stated).policy.layers
    assert bits["1"] == bits["2"] == bits["3"] and bits["4"] == LayerBits(1, 1)


def test_a_peak_cap_is_respected() -> None:
    stated = problem(["bitops=w4a4", "peak_activation_bytes=w4a4"], pinned={})
    found = Random().search(stated)
    assert fits(stated.network, found.policy, stated.choices.budget)


@given(st.integers(0, 2**32))
def test_a_peak_cap_beside_it_leaves_no_additive_cap_unused(seed: int) -> None:
    stated = problem(["bitops=w4a4", "peak_activation_bytes=w6a6"], pinned={}, seed=seed)
    found = Random().search(stated)
    assert fits(stated.network, found.policy, stated.choices.budget)
    assert found.policy.cost["bitops"] >= 0.98 * stated.choices.budget.caps["bitops"]


def test_a_peak_cap_alone_is_used() -> None:
    stated = problem("peak_activation_bytes=w6a6", pinned={})
    found = Random().search(stated)
    assert usage(stated, found) >= 0.98


def test_a_cap_above_the_largest_policy_cannot_be_used_up() -> None:
    with pytest.raises(BitscapeError, match=r"within 2% below the cap was found; the closest uses 50\.0% of the tightest of bitops"):
        Random(tries=2).search(problem("bitops=2x", layers=3))


def test_a_near_miss_is_returned_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    stated = problem("bitops=1.04x", layers=3)
    with caplog.at_level(logging.WARNING, logger="bitscape.searches"):
        found = Random(tries=2).search(stated)
    assert set(found.policy.layers.values()) == {LayerBits(8, 8)}
    assert "uses 96.2 % of the tightest of bitops; 98 % was asked for" in caplog.text


def test_an_infeasible_budget_is_told() -> None:
    with pytest.raises(InfeasibleBudget):
        Random().search(problem("bitops=0.01x"))


def test_settings_are_checked_and_recorded() -> None:
    with pytest.raises(BitscapeError, match=r"window=0\.0"):
        Random(window=0.0)
    with pytest.raises(BitscapeError, match="tries=0"):
        Random(tries=0)
    found = Random(window=0.1).search(problem("bitops=w4a4", seed=5))
    told = found.policy.provenance
    assert told["method"] == "random" and told["seed"] == 5 and told["settings"] == {"window": 0.1, "tries": 20}
    assert found.trace[-1]["used"] >= 0.9


def test_a_peak_cap_beside_bitops_does_not_loosen_the_control() -> None:
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3 if at == 0 else 8, 8, 3, padding=1) for at in range(6)))
    for seed in range(5):
        stated = SearchProblem.of(model, torch.zeros(1, 3, 8, 8), ["bitops=w6a6", "peak_activation_bytes=w8a6"], seed=seed)
        policy = Random().search(stated).policy
        assert 0.95 * stated.choices.budget.caps["bitops"] <= policy.cost["bitops"] <= stated.choices.budget.caps["bitops"]
