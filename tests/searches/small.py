"""Small networks, as costs only, and brute force over their policies."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from bitscape.cost.budget import Budget
from bitscape.cost.layers import LayerCost, NetworkProfile
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.searches import allocation
from bitscape.searches.choices import Choices
from bitscape.searches.scores import ScoreTable

Pinned = Mapping[str, LayerBits] | None
Tied = Sequence[Sequence[str]]


def layer(name: str, macs: int = 1000, weights: int = 64, inputs: int = 100, outputs: int = 100) -> LayerCost:
    return LayerCost(
        name=name,
        kind="Conv2d",
        macs=macs,
        weights=weights,
        weight_shape=(4, weights // 4),
        scales=4,
        input_elements=inputs,
        output_elements=outputs,
    )


def network(*layers: LayerCost) -> NetworkProfile:
    return NetworkProfile(layers=layers, input_shape=(3, 8, 8))


def random_network(layers: int, seed: int) -> NetworkProfile:
    rng = np.random.default_rng(seed)
    sizes = zip(
        *(rng.integers(low, high, layers).tolist() for low, high in ((10**5, 10**8), (100, 10**6), (100, 10**5))),
        strict=True,
    )
    return network(*(layer(f"layer{at}", macs, weights * 4, inputs) for at, (macs, weights, inputs) in enumerate(sizes)))


def noise_scores(measured: NetworkProfile, candidates: Sequence[LayerBits], seed: int) -> ScoreTable:
    """Scores that fall with bits as quantization noise does, over several magnitudes."""
    rng = np.random.default_rng(seed)
    weight, activation = np.exp(rng.normal(0, 2, (2, len(measured.layers), 1)))
    noise = [4.0 ** -np.array(bits, dtype=float) for bits in ([c.weight for c in candidates], [c.activation for c in candidates])]
    return ScoreTable(tuple(measured.by_name), tuple(candidates), weight * noise[0] + activation * noise[1], "noise")


def square(*widths: int) -> tuple[LayerBits, ...]:
    return tuple(LayerBits(w, a) for w, a in product(widths, widths))


def every_policy(measured: NetworkProfile, candidates: Sequence[LayerBits]) -> Iterator[tuple[tuple[int, ...], Policy]]:
    for choice in product(range(len(candidates)), repeat=len(measured.layers)):
        yield choice, Policy({name: candidates[at] for name, at in zip(measured.by_name, choice, strict=True)})


def fits(measured: NetworkProfile, policy: Policy, budget: Budget) -> bool:
    return not budget.exceeded(measured, policy)


def uniform(measured: NetworkProfile, weight: int, activation: int) -> Policy:
    return uniform_policy(measured.by_name, LayerBits(weight, activation))


def allocate(
    scores: ScoreTable, measured: NetworkProfile, budget: Budget, pinned: Pinned = None, tied: Tied = (), **options: Any
) -> Policy:
    return allocation.allocate(scores, choices(scores, measured, budget, pinned, tied), **options)


def near_best(
    scores: ScoreTable,
    measured: NetworkProfile,
    budget: Budget,
    pinned: Pinned = None,
    tied: Tied = (),
    *counts: Any,
    **options: Any,
) -> list[Policy]:
    return allocation.near_best(scores, choices(scores, measured, budget, pinned, tied), *counts, **options)


def pareto_front(scores: ScoreTable, measured: NetworkProfile, pinned: Pinned = None, *along: Any, **options: Any) -> list[Policy]:
    return allocation.pareto_front(scores, choices(scores, measured, Budget(), pinned), *along, **options)


def choices(scores: ScoreTable, measured: NetworkProfile, budget: Budget, pinned: Pinned, tied: Tied = ()) -> Choices:
    return Choices.of(measured, budget, candidates=scores.candidates, pinned=pinned, tied=tied)
