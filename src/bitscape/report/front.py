"""What scores promise at every cost: the front, controls beside it, and the chosen policy."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bitscape.cost.budget import Budget
from bitscape.cost.layers import NetworkProfile
from bitscape.cost.policy_cost import cost
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.searches.allocation import pareto_front
from bitscape.searches.choices import Choices
from bitscape.searches.knapsack import reachable
from bitscape.searches.random_policy import LARGEST_SHORTFALL, usage, walk
from bitscape.searches.scores import ScoreTable
from bitscape.searches.uniform import uniform_columns

RANDOM_POLICIES = 20
POINTS = 20
WINDOW = 0.02
"""Random policies use at least 98 % of the cap if they can, as those of the method `random`."""
DEFAULT_KIND = "bitops"
EIGHT = LayerBits(8, 8)


@dataclass(frozen=True)
class Point:
    """A policy by its cost and its total score."""

    name: str
    cost: float
    score: float
    fits: bool = True
    """Whether it keeps every cap of the budget."""
    policy: Policy | None = None
    """Its bits."""


@dataclass(frozen=True, kw_only=True)
class ComparedFront:
    """Policies along one kind of cost; lower scores are better."""

    kind: str
    """Of cost."""
    method: str
    """That scored."""
    caps: Mapping[str, float]
    """Of the budget of the chosen policy; {} if it tells none."""
    best: tuple[Point, ...]
    """The best policy for its cost, by ascending cost."""
    uniform: tuple[Point, ...]
    random: tuple[Point, ...]
    """Within all caps, and close to the tightest; none without a budget, or if none gets close."""
    chosen: Point | None
    """None if the scores do not cover its bits."""

    @property
    def median(self) -> float:
        """Score of the random policies."""
        return statistics.median(point.score for point in self.random)


def front_of(
    scores: ScoreTable,
    network: NetworkProfile,
    chosen: Policy | None = None,
    caps: Mapping[str, float] | None = None,
) -> ComparedFront:
    """Compute the front of a score table along the first cap, BitOps without one.

    Layers without scores were pinned: they have the bits of the chosen policy, else 8/8.
    Activations that its search kept at fixed bits stay so. Raises BitscapeError if scores, caps and
    network do not fit each other.
    """
    caps = dict(caps or {})
    kind = next(iter(caps), DEFAULT_KIND)
    free = set(scores.layers)
    bits = {} if chosen is None else chosen.layers
    pinned = {name: bits.get(name, EIGHT) for name in network.by_name if name not in free}
    activations = {} if chosen is None else fixed_activations(chosen, free)
    uncapped, capped = (
        _choices(scores, network, Budget(limits), pinned, activations) for limits in ({}, caps)
    )
    best = pareto_front(scores, uncapped, kind, POINTS)
    return ComparedFront(
        kind=kind,
        method=scores.method,
        caps=caps,
        best=tuple(
            Point("front", point.cost, point.score, policy=point.policy) for point in best.points
        ),
        uniform=tuple(_uniform(scores, capped, kind)),
        random=tuple(_random(scores, capped)) if caps else (),
        chosen=None if chosen is None else _point("chosen", scores, network, chosen, kind),
    )


def fixed_activations(policy: Policy, free: Iterable[str]) -> dict[str, int]:
    """Free layer -> bits of its activations, where the search left only its weights free: "*/8"."""
    told = policy.provenance.get("pinned")
    parts = {
        name: str(text).partition("/")
        for name, text in (told.items() if isinstance(told, Mapping) else ())
    }
    return {
        name: int(bits)
        for name, (weight, _, bits) in parts.items()
        if name in free and weight == "*" and bits.isdecimal()
    }


def _choices(
    scores: ScoreTable,
    network: NetworkProfile,
    budget: Budget,
    pinned: Mapping[str, LayerBits],
    activations: Mapping[str, int],
) -> Choices:
    choices = Choices.of(network, budget, candidates=scores.candidates, pinned=pinned)
    return replace(choices, freedom=replace(choices.freedom, activations=activations))


def score_of(scores: ScoreTable, policy: Policy) -> float | None:
    """Total score of a policy; None where it has bits that were not scored, or are forbidden."""
    columns = {bits: at for at, bits in enumerate(scores.candidates)}
    own = [(row, columns.get(policy.layers[name])) for row, name in enumerate(scores.layers)]
    total = sum(
        float("inf") if column is None else float(scores.values[row, column]) for row, column in own
    )
    return total if np.isfinite(total) else None


def _point(
    name: str, scores: ScoreTable, network: NetworkProfile, policy: Policy, kind: str
) -> Point | None:
    score = score_of(scores, policy)
    return None if score is None else Point(name, cost(kind, network, policy), score, policy=policy)


def _uniform(scores: ScoreTable, choices: Choices, kind: str) -> list[Point]:
    """Uniform policies; without caps, each of them fits."""
    try:
        columns = uniform_columns(scores.candidates, list(choices.budget.caps) or [kind])
    except BitscapeError:  # no pair of equal widths among the candidates
        return []
    points = []
    for column in columns:
        choice, name = choices.uniform(column), str(scores.candidates[column])
        point = _point(name, scores, choices.network, choices.policy(choice, {}), kind)
        if point is not None:
            points.append(replace(point, fits=choices.holds(choice)))
    return points


def _random(scores: ScoreTable, choices: Choices) -> list[Point]:
    """Random policies within the caps, by seeds 0, 1, ...

    Those that end further below than the method `random` accepts are left out.
    """
    rows = {name: row for row, name in enumerate(scores.layers)}
    scored = [
        np.isfinite([scores.values[rows[name]] for name in group]).all(0)
        for group in choices.freedom.groups
    ]
    allowed = reachable(np.array(scored) & choices.allowed, choices.caps) if scored else None
    if allowed is None:
        return []
    found = []
    for seed in range(RANDOM_POLICIES):
        rng = np.random.default_rng(seed)
        start = tuple(int(rng.choice(np.flatnonzero(row))) for row in allowed)
        choice = walk(choices, start, allowed, WINDOW, rng)
        if choices.holds(choice) and usage(choices, choice) >= 1 - LARGEST_SHORTFALL:
            found.append(
                _point(
                    f"random {seed}",
                    scores,
                    choices.network,
                    choices.policy(choice, {}),
                    next(iter(choices.budget.caps)),
                )
            )
    return [point for point in found if point is not None]
