from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.cost.policy_cost import policy_cost
from bitscape.policy import LayerBits, Policy
from bitscape.report.front import Point, fixed_activations, front_of, score_of
from bitscape.report.front_section import front_words
from tests.report.made import network, policy, scores, searched

EVERY = {
    (second, third): score + other
    for (second, score), (third, other) in product(
        zip(("2/2", "4/4", "2/4", "4/2"), (1.0, 0.01, 0.125, 0.5), strict=True),
        zip(("2/2", "4/4", "2/4", "4/2"), (2.0, 0.02, 0.75, 0.25), strict=True),
    )
}
"""Total score of each of the 16 policies."""


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def costs(own: Policy) -> dict[str, float]:
    return policy_cost(network(), own)


def test_a_score_is_the_sum_over_layers() -> None:
    assert {pairs: score_of(scores(), policy(*pairs)) for pairs in EVERY} == EVERY
    assert score_of(scores(), policy("3/3", "4/4")) is None


def test_the_front_is_what_no_policy_beats() -> None:
    front = front_of(scores(), network(), searched(), {"bitops": 1e9})
    every = sorted((costs(policy(*pairs))["bitops"], score) for pairs, score in EVERY.items())
    undominated = [point for point in every if not any(_beats(other, point) for other in every)]
    assert {(point.cost, point.score) for point in front.best} <= set(undominated)
    assert (front.best[0].cost, front.best[-1].score) == (every[0][0], min(EVERY.values()))
    assert front.chosen is not None
    assert (front.chosen.cost, front.chosen.score) == (
        costs(searched())["bitops"],
        EVERY["2/4", "4/2"],
    )


def test_uniform_policies_keep_the_pinned_bits() -> None:
    front = front_of(scores(), network(), searched(), {"bitops": 1e9})
    assert [(point.name, point.cost, point.score) for point in front.uniform] == [
        (text, costs(policy(text, text))["bitops"], EVERY[text, text]) for text in ("2/2", "4/4")
    ]


def test_random_policies_lie_within_every_cap_and_close_to_the_tightest() -> None:
    cap = costs(policy("4/4", "2/4"))["bitops"]
    front = front_of(scores(), network(), searched(), {"bitops": cap, "weight_bytes": 1e6})
    assert front.kind == "bitops" and front.random
    assert all(0.95 * cap <= point.cost <= cap for point in front.random)
    possible = {(costs(policy(*pairs))["bitops"], score) for pairs, score in EVERY.items()}
    assert {(point.cost, point.score) for point in front.random} <= possible
    assert (
        min(point.score for point in front.random)
        <= front.median
        <= max(point.score for point in front.random)
    )


def test_without_a_budget_there_are_no_random_ones_and_bitops_are_the_cost() -> None:
    front = front_of(scores(), network())
    assert (front.kind, front.random, front.chosen) == ("bitops", (), None)
    assert front.best[0].cost == pytest.approx(costs(policy("2/2", "2/2"))["bitops"])


def test_a_policy_beyond_the_scores_is_not_placed() -> None:
    assert front_of(scores(), network(), policy("3/3", "4/4"), {"bitops": 1e9}).chosen is None


def test_uniform_policies_must_keep_every_cap() -> None:
    caps = {"bitops": 1e9, "weight_bytes": costs(policy("2/2", "2/2"))["weight_bytes"]}
    front = front_of(scores(), network(), searched(), caps)
    assert [(point.name, point.fits) for point in front.uniform] == [("2/2", True), ("4/4", False)]


def test_the_best_uniform_policy_is_one_that_keeps_every_cap() -> None:
    caps = {"bitops": 1e9, "weight_bytes": costs(policy("2/2", "2/2"))["weight_bytes"]}
    assert "the best uniform one within it, 2/2, scores 3" in front_words(
        front_of(scores(), network(), searched(), caps)
    )
    impossible = replace(front_of(scores(), network(), searched(), caps), uniform=())
    assert "uniform" not in front_words(impossible)
    none = replace(impossible, uniform=(Point("2/2", 1.0, 3.0, fits=False),))
    assert "no uniform one is within it" in front_words(none)


@pytest.mark.parametrize("kept", [True, False])
def test_activations_that_the_search_kept_at_fixed_bits_stay_so(kept: bool) -> None:
    pinned = {"first": "8/8", "last": "8/8", **({"second": "*/4"} if kept else {})}
    chosen = policy("2/4", "4/4", pinned=pinned)
    cap = {"weight_bytes": costs(policy("4/4", "4/4"))["weight_bytes"]}
    front = front_of(scores(), network(), chosen, cap)
    pairs = [(second, third) for second, third in EVERY if not kept or second.endswith("/4")]
    assert {(point.cost, point.score) for point in front.random} <= {
        (costs(policy(*pair))["weight_bytes"], EVERY[pair]) for pair in pairs
    }
    assert {point.score for point in front.random} == {EVERY["4/4", "4/4"], EVERY["4/4", "4/2"]} | (
        set() if kept else {EVERY["4/2", "4/4"], EVERY["4/2", "4/2"]}
    )
    assert [(point.name, point.score) for point in front.uniform] == [
        ("2/4", EVERY["2/4", "2/4"]),
        ("4/4", EVERY["4/4", "4/4"]),
    ]


def test_the_fixed_activations_of_a_policy_are_those_of_its_free_layers() -> None:
    told = {"first": "8/8", "second": "*/8", "third": "*/16", "last": "*/many"}
    assert fixed_activations(policy(pinned=told), ["second", "last"]) == {"second": 8}
    assert (
        fixed_activations(policy(pinned="all"), ["second"])
        == fixed_activations(policy(), ["second"])
        == {}
    )


def test_what_a_search_kept_fixed_is_read_from_its_policy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    ).eval()
    result = bs.search(
        model,
        torch.randn(16, 8),
        "weight_bytes=450",
        candidates=[LayerBits(w, a) for w in (2, 4, 8) for a in (4, 8)],
    )
    assert result.choices.freedom.described()["4"] == "*/8"
    front = front_of(
        result.scores, result.choices.network, result.policy, result.choices.budget.caps
    )
    ours = fixed_activations(result.policy, result.choices.free_layers)
    assert ours == dict(result.choices.freedom.activations) == {"4": 8}
    assert front.best[0].score == pytest.approx(result.front.points[0].score)
    assert front.best[-1].score <= result.policy.provenance["score"]
