"""The smallest policy whose measured metric stays within a drop of the float network's.

Scores give the front of best policies by bytes; bisection over it quantizes, repairs and evaluates a few of them. Each
evaluation is kept in a file, so that the same call goes on where a killed one stopped.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitscape.cost.budget import Budget
from bitscape.data.epochs import epochs_of, first_of
from bitscape.data.reading import BatchReader
from bitscape.data.samples import Samples
from bitscape.engine.describe import describe, described_code
from bitscape.engine.evaluate import measured
from bitscape.engine.metrics import OnlyLoss, RelativeError
from bitscape.engine.task import Follow, Task, task_of
from bitscape.engine.user_task import User
from bitscape.errors import BitscapeError
from bitscape.policy import Policy
from bitscape.searches.allocation import pareto_front
from bitscape.searches.gain import gain_of
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchProblem, SearchResult, name_of
from bitscape.searches.scores import ScoreTable
from bitscape.verbs.evaluations import Evaluations
from bitscape.verbs.quantize import quantize

ALONG = "weight_bytes"
"""What is made as small as the drop allows."""
POINTS = 33
"""Of the front: five or six evaluations find the smallest that is good enough."""
SMALLER_IS_BETTER = (RelativeError, OnlyLoss)
"""Metrics that count with a minus."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a network is: larger is better."""

    name: str
    """Of the metric, as `evaluate` calls it, with a minus where smaller is better: "top1", "-relative_error"."""
    measure: Callable[[nn.Module], float]
    """The metric of a network on the evaluation data."""
    about: Mapping[str, Any]
    """What it is computed by, as JSON data: the task, and the code of what is the user's."""


def smallest_within(
    problem: SearchProblem,
    method: SearchMethod,
    drop: float,
    quality: Quality,
    evaluation: Samples,
    *,
    for_training: bool,
    folder: str | os.PathLike[str] | None,
) -> SearchResult:
    """Return the smallest policy of the front whose metric is at most `drop` below the float network's.

    Raises BitscapeError if the largest misses it, by how much, if the folder holds evaluations of another search, or if the
    metric is not finite.
    """
    started = time.perf_counter()
    asked = _asked(problem, method, quality, evaluation, for_training)
    log = Evaluations.of(None if folder is None else Path(folder), asked, "budget drop: the metric")
    floor = log.float_value(lambda: quality.measure(problem.prepared)) - drop  # first: it shows a metric that fails
    scores = log.scores(lambda: _scores(method, problem, for_training))
    front = pareto_front(scores, problem.choices, ALONG, POINTS).policies

    def value(policy: Policy) -> float:
        return log.value(policy, lambda: quality.measure(_quantized(problem, policy)))

    if (best := value(front[-1])) < floor:
        raise BitscapeError(
            f"budget drop={drop:g}: even the largest policy of the front ({front[-1].cost[ALONG]:,.0f} weight bytes) has {quality.name} "
            f"{best:.4g}, {floor + drop - best:.4g} below the float network's {floor + drop:.4g}; allow a larger drop, offer more bits, "
            "or keep layers float"
        )
    low, high = -1, len(front) - 1  # front[high] is good enough; front[low] is not, or there is none
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if value(front[middle]) >= floor else (middle, high)
    measured = {"allowed": drop, "metric": quality.name, "float": floor + drop, "value": value(front[high])}
    provenance = {**front[high].provenance, **problem.provenance(method), "drop": measured, "repairs": scores.repairs}
    policy = replace(front[high], provenance=provenance)
    seconds = time.perf_counter() - started
    trace = tuple(record for record in log.records if "policy" in record)
    gain = gain_of(scores, replace(problem.choices, budget=Budget({ALONG: policy.cost[ALONG]})))
    return SearchResult(policy, scores, trace, seconds, problem.choices, gain)


def quality_of(problem: SearchProblem, evaluation: Samples, metric: Any) -> Quality:
    """Return what `evaluate` measures of a network: the user's metric, or the one of the task.

    Outputs that are followed are compared with those of the float network. Raises BitscapeError without targets for others.
    """
    epochs = epochs_of(evaluation, BatchReader.of(problem.prepared))
    task = User(None, metric) if metric is not None else _task(problem, evaluation)
    reference = problem.prepared if isinstance(task, Follow) else None
    if reference is None and not evaluation.labelled:
        what = "a metric" if metric is not None else f"task {task.name!r}"
        raise BitscapeError(
            f"budget drop: {what} needs targets, and the data has none; pass evaluation=, data with targets, or task='follow'"
        )
    sign = -1.0 if isinstance(task.metric, SMALLER_IS_BETTER) else 1.0
    return Quality(
        name=f"{'-' if sign < 0 else ''}{task.metric.name}",
        measure=lambda network: sign * measured(network, epochs, task, reference=reference).value,
        about={"task": task.name, "code": described_code(task if isinstance(task, User) else None)},
    )


def _task(problem: SearchProblem, evaluation: Samples) -> Task:
    """The task asked for, or the one that outputs and targets suggest, as `evaluate` sees it."""
    asked = "follow" if isinstance(problem.task, Follow) else problem.task
    if not isinstance(asked, str):
        return asked
    first = first_of(epochs_of(evaluation, BatchReader.of(problem.prepared)))
    return task_of(problem.prepared, first.inputs, asked, first.targets)


def check_scores(method: SearchMethod) -> None:
    """Raise BitscapeError for a method whose scores do not serve every budget."""
    if "pick" not in method.options or "folder" in method.options:
        what = "learns at one budget" if "folder" in method.options else "has no scores"
        raise BitscapeError(f"budget drop: method {name_of(method)} {what}; use a method whose scores serve any budget, such as fisher")


def _scores(method: SearchMethod, problem: SearchProblem, for_training: bool) -> ScoreTable:
    options = {"for_training": for_training} if "for_training" in method.options else {}
    scores: ScoreTable = method.score(problem, **options)  # type: ignore[attr-defined]  # it has scores
    return scores


def _asked(
    problem: SearchProblem, method: SearchMethod, quality: Quality, evaluation: Samples, for_training: bool
) -> dict[str, Any]:
    """What decides scores and evaluations; the drop does not."""
    return {
        **{name: value for name, value in problem.provenance(method).items() if name not in ("images", "version")},
        "candidates": " ".join(map(str, problem.choices.candidates)),
        "tied": [" ".join(group) for group in problem.choices.freedom.groups if len(group) > 1],
        "for_training": for_training,
        "metric": {"name": quality.name, **quality.about},
        "model": describe(problem.prepared),
        "data": describe([[part.inputs, part.targets] for part in problem.samples.parts]),
        "evaluation": describe([[part.inputs, part.targets] for part in evaluation.parts]),
    }


def _quantized(problem: SearchProblem, policy: Policy) -> nn.Module:
    samples = problem.samples
    return quantize(problem.prepared, policy, samples, count=len(samples), quantizer=problem.quantizer)
