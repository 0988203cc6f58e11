import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitscape.cost.budget import Budget
from bitscape.cost.layers import NetworkProfile, idle_layer
from bitscape.cost.policy_cost import CAPS, cost, policy_cost
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy, fingerprint
from bitscape.searches import knapsack
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.knapsack import Solution
from bitscape.searches.scores import ScoreTable
from tests.searches.small import (
    allocate,
    every_policy,
    fits,
    layer,
    near_best,
    network,
    noise_scores,
    pareto_front,
    random_network,
    square,
    uniform,
)

pytestmark = pytest.mark.slow

KINDS = sorted(CAPS)


def timed(measured: NetworkProfile, seed: int) -> NetworkProfile:
    """With measured costs of every pair, which need not fall with bits."""
    rng = np.random.default_rng(seed)
    pairs = [LayerBits(weight, activation) for weight in range(1, 9) for activation in range(1, 9)]

    def costs() -> dict[LayerBits, int]:
        return {pair: int(rng.integers(1, 10**8)) for pair in pairs}

    layers = (
        replace(each, latency_ns=costs(), flash_bytes=costs(), sram_bytes=costs())
        for each in measured.layers
    )
    return replace(measured, layers=tuple(layers))


@st.composite
def problems(draw: st.DrawFn) -> tuple[NetworkProfile, ScoreTable, Budget]:
    """Up to 4 layers and 5 candidates; each cap is the exact cost of some policy, or a little more or less."""
    measured = timed(random_network(draw(st.integers(1, 4)), draw(st.integers(0, 10**6))), draw(st.integers(0, 10**6)))
    candidates = tuple(draw(st.lists(st.sampled_from(square(1, 2, 3, 4, 8)), min_size=1, max_size=5, unique=True)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = rng.exponential(size=(len(measured.layers), len(candidates)))
    forbidden = rng.random(values.shape) < draw(st.sampled_from([0.0, 0.2]))
    forbidden[:, 0] = False
    scores = ScoreTable(tuple(measured.by_name), candidates, np.where(forbidden, np.inf, values), "random")
    caps = {}
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True)):
        bits = {name: candidates[int(rng.integers(len(candidates)))] for name in measured.by_name}
        caps[kind] = cost(kind, measured, Policy(bits)) * draw(st.sampled_from([1.0, 1.0, 0.95, 1.1]))
    return measured, scores, Budget(caps)


def total(scores: ScoreTable, policy: Policy) -> float:
    return sum(scores.values[at, scores.candidates.index(policy.layers[name])] for at, name in enumerate(scores.layers))


@given(problems())
def test_the_policy_is_the_best_that_fits(problem: tuple[NetworkProfile, ScoreTable, Budget]) -> None:
    measured, scores, budget = problem
    feasible = [total(scores, p) for _, p in every_policy(measured, scores.candidates) if fits(measured, p, budget)]
    best = min(feasible, default=math.inf)
    try:
        policy = allocate(scores, measured, budget, {})
    except InfeasibleBudget:
        assert best == math.inf
    else:
        assert fits(measured, policy, budget)
        assert total(scores, policy) == pytest.approx(best, rel=1e-9)


@given(problems(), st.integers(1, 6), st.sampled_from([0.0, 0.05, 1.0]), st.booleans())
def test_the_near_best_policies_are_those_of_brute_force(
    problem: tuple[NetworkProfile, ScoreTable, Budget], count: int, within: float, tied: bool
) -> None:
    measured, scores, budget = problem
    ties = [tuple(measured.by_name)[:2]] if tied and len(measured.layers) > 1 else []
    usable = [p for _, p in every_policy(measured, scores.candidates) if all(len({p.layers[name] for name in tie}) == 1 for tie in ties)]
    near = sorted(((total(scores, p), p.layers) for p in usable if fits(measured, p, budget)), key=lambda pair: pair[0])
    try:
        found = near_best(scores, measured, budget, {}, ties, count, within)
    except InfeasibleBudget:
        assert not near or near[0][0] == math.inf
        return
    assert found[0] == allocate(scores, measured, budget, {}, ties)
    ideal = min(total(scores, p) for p in usable)
    most = near[0][0] + within * (near[0][0] - ideal) + 1e-9
    expected = [layers for score, layers in near if score <= most][:count]
    assert [policy.layers for policy in found] == expected
    assert all(policy.provenance["score"] == pytest.approx(total(scores, policy)) for policy in found)


@given(problems())
def test_the_smallest_feasible_values_are_feasible_and_smallest(
    problem: tuple[NetworkProfile, ScoreTable, Budget],
) -> None:
    measured, scores, budget = problem
    tight = Budget({kind: value * 0.6 for kind, value in budget.caps.items()})
    usable = [p for _, p in every_policy(measured, scores.candidates) if math.isfinite(total(scores, p))]
    try:
        allocate(scores, measured, tight, {})
    except InfeasibleBudget as error:
        for kind, value in error.alone.items():
            assert value == min(cost(kind, measured, p) for p in usable)
            assert fits(measured, allocate(scores, measured, Budget({kind: value}), {}), Budget({kind: value}))
        for kind, joint in error.jointly.items():
            others = Budget({other: most for other, most in tight.caps.items() if other != kind})
            beside = [cost(kind, measured, p) for p in usable if fits(measured, p, others)]
            assert joint == min(beside, default=None)
            if joint is not None:
                raised = Budget({**tight.caps, kind: joint})
                assert fits(measured, allocate(scores, measured, raised, {}), raised)


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sets(st.sampled_from(KINDS), min_size=1))
def test_budgets_equal_to_the_cost_of_a_uniform_policy_are_feasible(seed: int, bits: int, kinds: set[str]) -> None:
    measured = timed(random_network(8, seed), seed)
    pinned = dict.fromkeys(measured.ends, LayerBits(8, 8))
    reference = Policy({**uniform(measured, bits, bits).layers, **pinned})
    budget = Budget({kind: cost(kind, measured, reference) for kind in kinds})
    policy = allocate(noise_scores(measured, square(2, 3, 4, 8), seed), measured, budget)
    assert fits(measured, policy, budget)
    first, last = measured.ends
    assert policy.layers[first] == LayerBits(8, 8) and policy.layers[last].activation == 8
    widths = [set(CAPS[kind].depends_on) for kind in kinds]
    is_free = {"weight"} in widths and not any(len(both) == 2 for both in widths)
    assert policy.layers[last].weight == 8 or is_free


@given(st.integers(0, 10**6))
def test_at_the_budget_of_the_cheapest_policy_it_is_the_only_one(seed: int) -> None:
    measured = random_network(12, seed)
    budget = Budget({"bitops": cost("bitops", measured, uniform(measured, 2, 2))})
    assert allocate(noise_scores(measured, square(2, 3, 8), seed), measured, budget, {}).layers == uniform(measured, 2, 2).layers


def test_sixty_layers_and_25_pairs_under_two_caps_are_solved_to_a_proven_best() -> None:
    candidates = square(2, 3, 4, 6, 8)
    measured = random_network(60, 1)
    scores = noise_scores(measured, candidates, 2)
    reference = uniform(measured, 4, 4)
    budget = Budget({kind: 0.9 * cost(kind, measured, reference) for kind in ("bitops", "weight_bytes")})
    policy = allocate(scores, measured, budget)  # 0.4 s
    assert policy.provenance["gap"] == 0
    assert fits(measured, policy, budget)


def test_the_near_best_of_equal_layers_have_equal_scores() -> None:
    measured = network(*(layer(f"l{at}") for at in range(4)))
    scores = ScoreTable(tuple(measured.by_name), square(2, 4), np.tile([4.0, 2.0, 3.0, 0.0], (4, 1)), "equal")
    budget = Budget({"bitops": cost("bitops", measured, uniform(measured, 4, 4)) - 1})
    found = near_best(scores, measured, budget, {}, count=9, within=0.49)
    assert {frozenset(policy.layers.items()) for policy in found} == {
        frozenset({**uniform(measured, 4, 4).layers, name: LayerBits(2, 4)}.items()) for name in measured.by_name
    }
    assert len(near_best(scores, measured, budget, {}, count=9, within=0.51)) == 8


def test_everything_pinned_leaves_one_policy_near_the_best() -> None:
    measured = network(layer("a", 100), layer("b", 100))
    scores = ScoreTable((), square(4), np.zeros((0, 1)), "t")
    assert [p.layers for p in near_best(scores, measured, Budget({"bitops": 12800}))] == [uniform(measured, 8, 8).layers]
    with pytest.raises(InfeasibleBudget, match="feasible from 12800"):
        near_best(scores, measured, Budget({"bitops": 12799}))


@pytest.mark.parametrize(
    ("setting", "message"), [({"count": 0}, "count=0"), ({"within": -0.1}, "within=-0.1"), ({"within": math.nan}, "nan")]
)
def test_a_slack_or_count_out_of_range_is_refused(setting: dict[str, float], message: str) -> None:
    measured = random_network(2, 0)
    with pytest.raises(BitscapeError, match=message):
        near_best(noise_scores(measured, square(2, 4), 0), measured, Budget({"bitops": 1e12}), {}, **setting)


def test_sixty_equal_layers_are_no_trouble() -> None:
    measured = network(*(layer(f"l{at}", 10**6 + 1, 4096) for at in range(60)))
    candidates = square(2, 3, 4, 6, 8)
    values = np.tile([1 / (c.weight * c.activation) for c in candidates], (60, 1))
    budget = Budget({kind: 1.07 * cost(kind, measured, uniform(measured, 3, 3)) for kind in ("bitops", "mean_weight_bits")})
    assert fits(measured, allocate(ScoreTable(tuple(measured.by_name), candidates, values, "equal"), measured, budget), budget)


def test_a_policy_carries_cost_fingerprint_and_provenance() -> None:
    measured = replace(random_network(4, 0), never_called=(idle_layer("unused", nn.Linear(2, 2)),))
    scores = noise_scores(measured, square(2, 4), 0)
    budget = Budget({"bitops": cost("bitops", measured, uniform(measured, 6, 6))})
    policy = allocate(scores, measured, budget)
    policy.check(measured.shapes)
    assert policy.fingerprint == fingerprint(measured.shapes)
    assert policy.cost == policy_cost(measured, policy)
    assert policy.provenance["method"] == "noise"
    assert policy.provenance["budget"] == dict(budget.caps)
    free = [at for at, name in enumerate(scores.layers) if name not in measured.ends]
    columns = [scores.candidates.index(policy.layers[scores.layers[at]]) for at in free]
    assert policy.provenance["score"] == pytest.approx(scores.values[free, columns].sum())


def test_tied_layers_share_one_pair_and_follow_a_pinned_one() -> None:
    measured = random_network(6, 3)
    scores = noise_scores(measured, square(2, 4, 8), 3)
    budget = Budget({"bitops": cost("bitops", measured, uniform(measured, 4, 4))})
    policy = allocate(
        scores,
        measured,
        budget,
        {"layer5": LayerBits(3, 3)},
        [("layer0", "layer1"), ("layer1", "layer2"), ("layer4", "layer5")],
    )
    assert policy.layers["layer0"] == policy.layers["layer1"] == policy.layers["layer2"]
    assert policy.layers["layer4"] == policy.layers["layer5"] == LayerBits(3, 3)
    assert fits(measured, policy, budget)


def test_layers_that_share_a_weight_are_tied_by_themselves() -> None:
    measured = random_network(3, 4)
    first, second, third = measured.layers
    shared = network(first, replace(second, weights=0, scales=0, tied_to="layer0"), third)
    scores = ScoreTable(tuple(shared.by_name), square(2, 8), np.array([[9, 9, 9, 0], [0, 9, 9, 8], [0, 0, 0, 0.0]]), "t")
    policy = allocate(scores, shared, Budget({"mean_weight_bits": 8.0}), {})
    assert policy.layers["layer0"] == policy.layers["layer1"] == LayerBits(8, 8)


def test_a_peak_cap_forbids_pairs() -> None:
    measured = network(layer("small", inputs=80, outputs=10), layer("large", inputs=800, outputs=10))
    scores = noise_scores(measured, square(2, 4, 8), 0)
    policy = allocate(scores, measured, Budget({"peak_activation_bytes": 410}), {})
    assert policy.layers == {"small": LayerBits(8, 8), "large": LayerBits(8, 4)}


def test_an_infeasible_budget_says_what_would_do() -> None:
    measured = network(layer("first", 10), layer("big", 1000), layer("mid", 100), layer("last", 1))
    scores = noise_scores(measured, square(2, 4), 0)
    with pytest.raises(InfeasibleBudget) as raised:
        allocate(scores, measured, Budget({"bitops": 100}))
    assert str(raised.value) == (
        "budget: no policy fits bitops=100 (feasible from 5104; most of it in big, first (pinned), "
        "mid); raise a cap, offer fewer bits or free pinned layers by pinned={} or --pin none"
    )
    assert raised.value.alone == {"bitops": 5104}
    assert raised.value.layers == {"bitops": ("big", "first", "mid")}
    assert raised.value.jointly == {}


def test_caps_that_contradict_each_other_are_told_jointly() -> None:
    measured = network(layer("a", 100, 100, 100), layer("b", 100, 100, 100))
    pairs = (LayerBits(2, 8), LayerBits(8, 2))
    scores = ScoreTable(("a", "b"), pairs, np.ones((2, 2)), "t")
    budget = Budget({"mean_weight_bits": 4.0, "mean_activation_bits": 4.0})
    with pytest.raises(InfeasibleBudget, match=r"8.0 with the other caps kept.*each cap can be met alone, but not all together") as raised:
        allocate(scores, measured, budget, {})
    assert raised.value.alone == {"mean_weight_bits": 2, "mean_activation_bits": 2}
    assert raised.value.jointly == {"mean_weight_bits": 8, "mean_activation_bits": 8}


def test_a_cap_beside_others_that_contradict_each_other_has_no_value() -> None:
    measured = network(layer("a", 100, 100, 100))
    scores = ScoreTable(("a",), (LayerBits(2, 8), LayerBits(8, 2)), np.ones((1, 2)), "t")
    budget = Budget({"mean_weight_bits": 4.0, "mean_activation_bits": 4.0, "bitops": 1e9})
    with pytest.raises(InfeasibleBudget, match=r"bitops=1000000000.0 \(feasible from no value") as raised:
        allocate(scores, measured, budget, {})
    assert raised.value.jointly["bitops"] is None


def test_everything_pinned_costs_what_it_costs() -> None:
    measured = network(layer("a", 100), layer("b", 100))
    scores = ScoreTable((), square(4), np.zeros((0, 1)), "t")
    assert allocate(scores, measured, Budget({"bitops": 12800})).layers == uniform(measured, 8, 8).layers
    with pytest.raises(InfeasibleBudget, match="feasible from 12800"):
        allocate(scores, measured, Budget({"bitops": 12799}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("layer0", "layer1", "other2")}, "no layer 'other2'"),
        ({"fingerprint": "0000"}, "fingerprint 0000, and this one has [0-9a-f]{16}.*score this network"),
        ({"layers": ("layer0", "layer1"), "values": np.ones((2, 2))}, "layer 'layer2' has no row"),
    ],
)
def test_scores_of_another_network_are_refused(change: dict[str, object], message: str) -> None:
    measured = random_network(3, 0)
    scores = ScoreTable(tuple(measured.by_name), (LayerBits(2, 2), LayerBits(4, 4)), np.ones((3, 2)), "t")
    with pytest.raises(BitscapeError, match=message):
        allocate(replace(scores, **change), measured, Budget({"bitops": 1e12}), {})
    with pytest.raises(BitscapeError, match=message):
        pareto_front(replace(scores, **change), measured, {})


def test_tied_layers_without_a_common_pair_are_named() -> None:
    measured = random_network(2, 0)
    scores = ScoreTable(("layer0", "layer1"), (LayerBits(2, 2), LayerBits(4, 4)), np.array([[1, np.inf], [np.inf, 1]]), "t")
    with pytest.raises(BitscapeError, match="layer0, layer1 have no pair"):
        allocate(scores, measured, Budget({"bitops": 1e12}), {}, [("layer0", "layer1")])


@pytest.mark.parametrize("kind", KINDS)
def test_the_front_runs_from_the_cheapest_to_the_best_and_is_optimal(kind: str) -> None:
    measured = timed(random_network(4, 7), 7)
    scores = noise_scores(measured, square(2, 4, 8), 7)
    front = pareto_front(scores, measured, {}, kind, points=8).policies
    costs, totals = [p.cost[kind] for p in front], [total(scores, p) for p in front]
    everything = [(cost(kind, measured, p), total(scores, p)) for _, p in every_policy(measured, scores.candidates)]
    assert costs == sorted(costs) and totals == sorted(totals, reverse=True)
    assert costs[0] == min(costs for costs, _ in everything)
    assert totals[-1] == pytest.approx(min(totals for _, totals in everything))
    for point, score in zip(costs, totals, strict=True):
        assert score == pytest.approx(min(s for c, s in everything if c <= point))


def test_a_front_has_about_as_many_points_as_asked_for() -> None:
    measured = random_network(20, 8)
    front = pareto_front(noise_scores(measured, square(2, 3, 4, 8), 8), measured, points=12).policies
    assert 10 <= len(front) <= 12
    assert front[3].provenance["budget"] == {"bitops": front[3].cost["bitops"]}
    with pytest.raises(BitscapeError, match="points=1"):
        pareto_front(noise_scores(measured, square(2, 3), 8), measured, points=1)


def test_scores_that_say_nothing_are_not_allocated_from() -> None:
    measured = random_network(3, 0)
    budget = Budget({"bitops": 1e12})
    for values in (np.zeros((3, 4)), np.full((3, 4), 7.0), np.tile([[1.0], [2.0], [3.0]], 4), np.full((3, 4), 1.0) + 1e-15):
        scores = ScoreTable(tuple(measured.by_name), square(2, 4), values, "kl")
        for call in (lambda s: allocate(s, measured, budget, {}), lambda s: pareto_front(s, measured, {})):
            with pytest.raises(BitscapeError, match=r"method kl gives every pair of bits of a layer the same score.*use method local"):
                call(scores)


def test_scores_of_one_pair_or_of_one_layer_that_differ_are_allocated_from() -> None:
    measured = random_network(2, 0)
    one = ScoreTable(tuple(measured.by_name), square(4), np.zeros((2, 1)), "t")
    assert allocate(one, measured, Budget({"bitops": 1e12}), {}).layers == uniform(measured, 4, 4).layers
    values = np.array([[0.0, 0.0, 0.0, 0.0], [3.0, 2.0, 2.0, 1e-9]])
    two = ScoreTable(tuple(measured.by_name), square(2, 4), values, "t")
    assert allocate(two, measured, Budget({"bitops": 1e12}), {}).layers["layer1"] == LayerBits(4, 4)


def test_a_budget_that_is_left_while_layers_could_have_more_bits_is_said(caplog: pytest.LogCaptureFixture) -> None:
    measured = network(layer("a", 100), layer("b", 100))
    scores = ScoreTable(("a", "b"), square(2, 8), np.array([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]), "t")
    allocate(scores, measured, Budget({"bitops": 12800}), {})
    assert "uses at most 53 % of each cap although layers could take more bits (a has 2/2, 2/8 fits)" in caplog.text
    caplog.clear()
    allocate(noise_scores(measured, square(2, 8), 0), measured, Budget({"bitops": 1e9}), {})  # the widest bits are taken
    allocate(noise_scores(measured, square(2, 8), 0), measured, Budget({"bitops": 1599}), {})  # the next wider ones do not fit
    assert not caplog.text


def test_a_gap_is_told_in_the_policy_and_in_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    measured = random_network(3, 0)
    scores = noise_scores(measured, square(2, 4), 0)
    budget = Budget({"bitops": cost("bitops", measured, uniform(measured, 4, 4)) - 1})
    assert allocate(scores, measured, budget, {}).provenance["gap"] == 0.0
    stopped = Solution((0, 0, 0), 2.0, 1.5)
    monkeypatch.setattr(knapsack, "near_best", lambda *_, **__: [stopped])
    assert allocate(scores, measured, budget, {}, time_limit_s=3.0).provenance["gap"] == 0.25
    assert "stopped after 3 s; a better policy could save at most 25.00% of the score that the budget costs" in caplog.text


def test_layers_with_a_single_pair_need_no_scores_that_differ() -> None:
    measured = network(layer("a"), layer("b"), layer("c"))
    scores = ScoreTable(("b",), (LayerBits(4, 4),), np.array([[3.2e-6]]), "fisher")
    budget = Budget({"weight_bytes": cost("weight_bytes", measured, uniform(measured, 8, 8))})
    policy = allocate(scores, measured, budget, {"a": LayerBits(8, 8), "c": LayerBits(8, 8)})
    assert policy.layers["b"] == LayerBits(4, 4)
