"""The smallest policy whose measured metric stays within a drop of the float network's.

Scores give the front of best policies by bytes; bisection over it quantizes, repairs and evaluates a few of them. Each
evaluation is kept in a file, so that the same call goes on where a killed one stopped.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import call, sample_count
from bitscape.data.samples import Samples
from bitscape.engine.checkpoint import changes
from bitscape.engine.describe import describe
from bitscape.engine.task import Task
from bitscape.errors import BitscapeError
from bitscape.models.modes import evaluating
from bitscape.policy import Policy
from bitscape.quant.convert import batches_of
from bitscape.searches.allocation import pareto_front
from bitscape.searches.gain import gain_of
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchProblem, SearchResult, name_of
from bitscape.searches.scores import ScoreTable
from bitscape.verbs.quantize import quantize

ALONG = "weight_bytes"
"""What is made as small as the drop allows."""
POINTS = 33
"""Of the front: five or six evaluations find the smallest that is good enough."""
EVALUATIONS_FILE, SCORES_FILE = "evaluations.jsonl", "scores.json"
BATCH = 64
Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a network is: larger is better."""

    name: str
    """Of the metric: "top1" (percent), "accuracy" (percent of answers), "-relative_error", or the user's."""
    measure: Callable[[nn.Module], float]
    """The metric of a network on the evaluation data."""


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

    Raises BitscapeError if the largest misses it, by how much, or if the folder holds evaluations of another search.
    """
    started = time.perf_counter()
    asked = _asked(problem, method, quality, evaluation, for_training)
    log = Evaluations.of(None if folder is None else Path(folder), asked)
    scores = log.scores(lambda: _scores(method, problem, for_training))
    front = pareto_front(scores, problem.choices, ALONG, POINTS).policies

    def value(policy: Policy) -> float:
        return log.value(policy, lambda: quality.measure(quantize(problem.prepared, policy, problem.samples, count=len(problem.samples))))

    floor = log.float_value(lambda: quality.measure(problem.prepared)) - drop
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
    return SearchResult(policy, scores, tuple(log.records), seconds, problem.choices, gain_of(scores, problem.choices))


def quality_of(problem: SearchProblem, evaluation: Samples, metric: Metric | None) -> Quality:
    """Return the user's metric, averaged over samples, or the one of the task. Raises BitscapeError without targets for it."""
    task = problem.meaning
    if metric is not None:
        _need_targets(evaluation, "a metric")
        name = getattr(metric, "__name__", type(metric).__name__)
        return Quality(name=name, measure=lambda network: _mean(network, evaluation, metric))
    if task.name == "follow":
        return Quality(name="-relative_error", measure=lambda network: -_relative_error(network, problem.prepared, evaluation, task))
    if task.name not in ("classes", "binary"):
        raise BitscapeError(f"budget drop: task {task.name!r} has no metric here; pass metric=, a function of outputs and targets")
    _need_targets(evaluation, f"task {task.name!r}")
    right = _top1 if task.name == "classes" else _answers
    return Quality(
        name="top1" if task.name == "classes" else "accuracy", measure=lambda network: 100 * _mean(network, evaluation, right(task))
    )


def _scores(method: SearchMethod, problem: SearchProblem, for_training: bool) -> ScoreTable:
    if "pick" not in method.options or "folder" in method.options:
        what = "learns at one budget" if "folder" in method.options else "has no scores"
        raise BitscapeError(f"budget drop: method {name_of(method)} {what}; use a method whose scores serve any budget, such as fisher")
    options = {"for_training": for_training} if "for_training" in method.options else {}
    return method.score(problem, **options)  # type: ignore[union-attr]  # it has scores


@dataclass(kw_only=True)
class Evaluations:
    """What was measured so far, also in a file of JSON lines; a line that a crash cut off is done again."""

    path: Path | None
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path | None, asked: Mapping[str, Any]) -> "Evaluations":
        """Go on from the folder's file, or begin one. Raises BitscapeError if it is of another search."""
        if folder is None:
            return cls(path=None)
        folder.mkdir(parents=True, exist_ok=True)
        log = cls(path=folder / EVALUATIONS_FILE)
        asked = json.loads(json.dumps(asked))
        lines = _lines(folder / EVALUATIONS_FILE)
        if not lines:
            log._write({"search": asked})
        elif changed := changes(lines[0].get("search", {}), asked):
            raise BitscapeError(f"folder {folder} is of another search: {changed}; give another folder, or delete this one")
        log.records = lines[1:]
        return log

    def scores(self, score: Callable[[], ScoreTable]) -> ScoreTable:
        """Return the scores of the file beside, or the ones that `score` makes."""
        path = None if self.path is None else self.path.with_name(SCORES_FILE)
        if path is not None and path.is_file():
            return ScoreTable.load(path)
        scores = score()
        if path is not None:
            scores.save(path)
        return scores

    def float_value(self, measure: Callable[[], float]) -> float:
        """Return the metric of the float network."""
        return self._value("float", {}, measure)

    def value(self, policy: Policy, measure: Callable[[], float]) -> float:
        """Return the metric of a policy's network."""
        bits = {name: str(bits) for name, bits in policy.layers.items()}
        key = hashlib.sha256(json.dumps(bits, sort_keys=True).encode()).hexdigest()[:16]
        return self._value(key, {ALONG: policy.cost[ALONG]}, measure)

    def _value(self, key: str, about: Mapping[str, Any], measure: Callable[[], float]) -> float:
        known = next((record["value"] for record in self.records if record["policy"] == key), None)
        if known is not None:
            return float(known)
        started = time.perf_counter()
        value = float(measure())
        record = {"policy": key, **about, "value": value, "seconds": round(time.perf_counter() - started, 3)}
        self.records.append(record)
        self._write(record)
        return value

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line without an end is taken out of it."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole, _, cut = text.rpartition("\n")
    if cut:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise BitscapeError(f"{path}: it is damaged ({error}); give another folder, or delete this one") from error


def _asked(
    problem: SearchProblem, method: SearchMethod, quality: Quality, evaluation: Samples, for_training: bool
) -> dict[str, Any]:
    """What decides scores and evaluations; the drop does not."""
    return {
        **{name: value for name, value in problem.provenance(method).items() if name not in ("images", "version")},
        "candidates": " ".join(map(str, problem.choices.candidates)),
        "tied": [" ".join(group) for group in problem.choices.freedom.groups if len(group) > 1],
        "for_training": for_training,
        "metric": quality.name,
        "model": describe(problem.prepared),
        "data": describe([part.inputs for part in problem.samples.parts]),
        "evaluation": describe([[part.inputs, part.targets] for part in evaluation.parts]),
    }


def _need_targets(evaluation: Samples, what: str) -> None:
    if not evaluation.labelled:
        raise BitscapeError(
            f"budget drop: {what} needs targets, and the data has none; pass evaluation=, data with targets, or task='follow'"
        )


def _top1(task: Task) -> Metric:
    return lambda outputs, targets: (task.outputs(outputs, len(targets)).argmax(1) == targets).double().mean()


def _answers(task: Task) -> Metric:
    threshold = 0.5 if getattr(task, "probabilities", False) else 0.0

    def right(outputs: Any, targets: Tensor) -> Tensor:
        answers = task.outputs(outputs, len(targets)) > threshold
        return (answers.reshape(targets.shape) == (targets > 0.5)).double().mean()

    return right


def _mean(network: nn.Module, samples: Samples, metric: Metric) -> float:
    """The metric's mean over batches, weighted by their samples."""
    total = 0.0
    with evaluating(network):
        for batch in samples.batches(BATCH):
            (inputs,) = batches_of([batch.inputs], network)
            total += float(metric(call(network, inputs), batch.targets)) * len(batch)
    return total / len(samples)


def _relative_error(network: nn.Module, reference: nn.Module, samples: Samples, task: Task) -> float:
    """Norm of the difference over the norm of the float network's outputs, each tensor in units of its own spread."""
    difference = norm = torch.zeros((), dtype=torch.float64)
    with evaluating(network), evaluating(reference):
        for inputs in batches_of(samples, network, BATCH):
            outputs, aim = (task.outputs(call(model, inputs), sample_count(inputs)).double() for model in (network, reference))
            difference = difference + (outputs - aim).square().sum().cpu()
            norm = norm + aim.square().sum().cpu()
    return float((difference / norm.clamp(min=1e-300)).sqrt())
