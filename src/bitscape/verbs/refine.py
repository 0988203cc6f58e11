"""A search that measures: policies near the one found are quantized, repaired and compared by outputs.

Scores add up over layers, and see each layer alone. An evaluation quantizes and repairs the whole
network and measures how far its outputs diverge from the float network's. What is measured corrects
the scores: those of a layer's weights, and those of its activations, are multiplied by a factor,
and a linear model of the divergences learns these factors from the evaluations so far. The next
policy is the best one under factors drawn from what is known of them (Thompson sampling), so that
bits move between layers where it may pay and was not yet tried. Uniform bits are tried first. A
policy is kept if it is better than the first by more than a standard deviation of what is known.

Half of the samples repair and the other half measure, and the reverse. All of it is ours.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitscape.engine.describe import describe
from bitscape.engine.following import outputs_on
from bitscape.errors import BitscapeError
from bitscape.folders import POLICY_FILE
from bitscape.policy import Policy
from bitscape.progress import track
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.repair import repair
from bitscape.searches.allocation import group_scores
from bitscape.searches.choices import Choices
from bitscape.searches.knapsack import solve
from bitscape.searches.problem import SearchProblem, SearchResult
from bitscape.searches.programme import Choice
from bitscape.searches.uniform import ladder, mixed
from bitscape.verbs.evaluations import Evaluations
from bitscape.verbs.proxy import parted

_log = logging.getLogger("bitscape.verbs")
Floats = NDArray[np.float64]

SPREAD_OF_LAYER, SPREAD_OF_SIDE = 0.5, 0.5
"""Standard deviations of the factors before anything is measured: of each by itself, and of what
those of all weights, or of all activations, share. Factors are 1 on average.
"""
NOISE = 0.2
"""Standard deviation of a measured divergence, as a share of the first: repair may be lucky. Over
other halves of 256 images it is 0.1 to 0.2 on ResNet-20 at 3 bits.
"""
LEAST = 0.1
"""Factors that are drawn are at least this."""


def refined(
    problem: SearchProblem,
    result: SearchResult,
    evaluations: int,
    folder: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Return the best of up to `evaluations` policies that are measured, first of all `result`'s own.

    The divergence measured of the returned policy is at most that of the first. Equal arguments
    give an equal policy. A folder keeps the evaluations, and the best policy so far in policy.json;
    the same call goes on from there.

    Raises BitscapeError for a result without scores, and for a folder of another search.
    """
    started, choices = time.perf_counter(), problem.choices
    if result.scores is None:
        raise BitscapeError(
            f"refine={evaluations}: method {result.policy.provenance.get('method')} has no scores "
            "to start from, or all layers are pinned; use a method that scores, such as fisher"
        )
    place = None if folder is None else Path(folder)
    log = Evaluations.of(place, _asked(problem, result), "refine: the divergence")
    halves = _Halves(problem)
    beliefs = Beliefs(group_scores(result.scores, choices), choices)
    pairs = (result.policy.layers[group[0]] for group in choices.freedom.groups)
    first = tuple(choices.candidates.index(pair) for pair in pairs)
    proposals = islice(proposed(beliefs, first, problem.seed), evaluations)
    policy, trace = result.policy, []
    for choice in track(proposals, label="refine: evaluation", total=evaluations):
        tried = choices.policy(choice, {})
        divergence = log.value(tried, lambda tried=tried: halves.divergence(tried))  # type: ignore[misc]  # bound now
        beliefs.add(choice, divergence)
        changed = len(tried.difference(result.policy))
        trace.append({"divergence": divergence, "layers_changed": changed})
        policy = _best(beliefs, choices, result.policy)
        if place is not None:
            policy.save(place / POLICY_FILE)
    shown = policy.provenance["refine"]
    _log.info("refine: divergence %(first).4g -> %(divergence).4g, %(evaluations)d evaluations", shown)
    seconds = result.seconds + time.perf_counter() - started
    return replace(result, policy=policy, trace=(*result.trace, *trace), seconds=seconds)


class _Halves:
    """Both halves of the samples: each judges the network that the other one repairs."""

    def __init__(self, problem: SearchProblem) -> None:
        first, second = parted(problem.samples, 2)
        self.task, self.sides = problem.meaning, ((first, second), (second, first))
        self.quantizer = problem.quantizer
        self.model = fold_norms(problem.prepared, problem.samples.first(2).parts[0].inputs)
        self.outputs = [outputs_on(self.model, half, self.task) for half in (second, first)]

    def divergence(self, policy: Policy) -> float:
        """Mean divergence over all samples of the network at the bits of `policy`."""
        found = []
        for (seen, judging), outputs in zip(self.sides, self.outputs, strict=True):
            network = calibrate(with_quantizers(self.model, policy, self.quantizer), seen)
            repair(network, self.model, seen)
            moved = outputs_on(network, judging, self.task)
            found += list(map(self.task.divergence, moved, outputs))
        return float(torch.cat(found).double().mean())


def parts_of(values: Floats, candidates: Sequence[Any]) -> Floats:
    """Split scores (groups, candidates) into those of weights and of activations, (2, groups, candidates).

    The weights' part of a pair is the score of its weight bits beside the widest activations, above
    the group's best; the rest is the activations'. Pairs that are not allowed stay infinite.
    """
    allowed = np.isfinite(values)
    finite = np.where(allowed, values, 0.0)
    widest = np.empty_like(finite)
    for column, pair in enumerate(candidates):
        alike = [index for index, other in enumerate(candidates) if other.weight == pair.weight]
        alike.sort(key=lambda index: -candidates[index].activation)
        chosen = np.array(alike)[allowed[:, alike].argmax(1)]
        widest[:, column] = finite[np.arange(len(finite)), chosen]
    best = np.where(allowed, values, np.inf).min(1, keepdims=True)
    return np.where(allowed, np.stack([widest - best, finite - widest]), np.inf)


class Beliefs:
    """What is known of each layer's factors: a normal distribution, made narrower by each evaluation."""

    def __init__(self, values: Floats, choices: Choices) -> None:
        """`values`: scores, (groups, candidates), infinite where a pair is not allowed."""
        self.choices = choices
        self.parts = parts_of(values, choices.candidates)
        self.measured: dict[Choice, float] = {}
        side = np.kron(np.eye(2), np.ones((len(values), len(values))))
        self.prior = SPREAD_OF_LAYER**2 * np.eye(2 * len(values)) + SPREAD_OF_SIDE**2 * side

    def add(self, choice: Choice, divergence: float) -> None:
        """Note what was measured of a choice; the first one gives scores their unit."""
        self.measured[choice] = divergence

    @property
    def first(self) -> float:
        """The divergence measured first."""
        return next(iter(self.measured.values()))

    @property
    def unit(self) -> float:
        """Divergence of a score of 1, by the first choice; 0 where that costs no score."""
        total = self._rows([next(iter(self.measured))]).sum()
        return float(self.first / total) if total > 0 else 0.0

    def posterior(self) -> tuple[Floats, Floats]:
        """Mean and covariance of the factors, weights first, then activations: (2 g,), (2 g, 2 g)."""
        rows = self.unit * self._rows(list(self.measured))
        surprise = np.array(list(self.measured.values())) - rows.sum(1)
        noise = (NOISE * self.first) ** 2 * np.eye(len(rows))
        pull = np.linalg.solve(rows @ self.prior @ rows.T + noise, rows @ self.prior).T
        return 1.0 + pull @ surprise, self.prior - pull @ rows @ self.prior

    def rises(self, choices: Sequence[Choice]) -> Floats:
        """By how much each choice's divergence is above that of the first: mean plus deviation."""
        mean, covariance = self.posterior()
        away = self.unit * (self._rows(choices) - self._rows([next(iter(self.measured))]))
        variance = np.einsum("ci,ij,cj->c", away, covariance, away)
        rises: Floats = away @ mean + np.sqrt(np.maximum(variance, 0.0))
        return rises

    def drawn(self, generator: np.random.Generator) -> Floats:
        """Scores (groups, candidates) under factors drawn from the posterior."""
        mean, covariance = self.posterior()
        factors = generator.multivariate_normal(mean, covariance, method="eigh", check_valid="ignore")
        by_side = np.maximum(factors, LEAST).reshape(2, -1, 1)
        scores: Floats = np.where(np.isfinite(self.parts), by_side * self.parts, np.inf).sum(0)
        return scores

    def _rows(self, choices: Sequence[Choice]) -> Floats:
        groups = np.arange(self.parts.shape[1])
        return np.stack([self.parts[:, groups, list(choice)].ravel() for choice in choices])


def proposed(beliefs: Beliefs, first: Choice, seed: int) -> Iterator[Choice]:
    """Yield choices to measure, none twice: `first`, uniform ones, and the best under drawn factors.

    Each is to be added to `beliefs` before the next is asked for. It ends where no score is left to
    win, or no other choice fits the budget.
    """
    yield first
    if beliefs.unit == 0.0:
        return
    yield from (choice for choice in _uniform(beliefs.choices) if choice not in beliefs.measured)
    generator = np.random.default_rng(seed)
    while True:
        drawn, caps = beliefs.drawn(generator), beliefs.choices.caps
        solution = solve(drawn, caps, excluded=tuple(beliefs.measured))
        if solution is None:
            return
        yield solution.choice


def _uniform(choices: Choices) -> list[Choice]:
    """The largest uniform width that fits, and the mix of it with the next; none where none fits."""
    try:
        columns = ladder(choices)
    except BitscapeError:  # no candidate has equal bits
        return []
    fitting = [column for column in columns if choices.holds(choices.uniform(column))]
    if not fitting:
        return []
    wider = columns[min(columns.index(fitting[-1]) + 1, len(columns) - 1)]
    both = choices.uniform(fitting[-1]), mixed(choices, fitting[-1], wider)
    return list(dict.fromkeys(both))


def _best(beliefs: Beliefs, choices: Choices, start: Policy) -> Policy:
    """Of the choices measured no worse than the first, and better by all that is known, the best."""
    no_worse = [choice for choice, found in beliefs.measured.items() if found <= beliefs.first]
    best = no_worse[int(beliefs.rises(no_worse).argmin())]  # the first rises by 0
    about = {
        "evaluations": len(beliefs.measured),
        "first": beliefs.first,
        "divergence": beliefs.measured[best],
    }
    kept = {name: value for name, value in start.provenance.items() if name not in ("score", "gap")}
    return choices.policy(best, {**kept, "refine": about})


def _asked(problem: SearchProblem, result: SearchResult) -> Mapping[str, Any]:
    """What decides the evaluations; their number does not."""
    assert result.scores is not None
    scores = hashlib.sha256(result.scores.values.tobytes()).hexdigest()
    return {
        "refine": result.policy.provenance.get("method"),
        **problem.choices.provenance(),
        "scores": scores,
        "seed": problem.seed,
        "model": describe(problem.prepared),
        "data": describe([part.inputs for part in problem.samples.parts]),
    }
