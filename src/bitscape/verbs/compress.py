"""bs.compress: a float network, a few samples and a budget in; checked files and a comparison with uniform bits out."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bitscape.cost.budget import BudgetText
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.samples import Samples
from bitscape.engine.evaluate import Evaluation
from bitscape.engine.task import Task, TaskName
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchResult
from bitscape.searches.uniform import Uniform
from bitscape.tables import Shown, Table
from bitscape.verbs.evaluate import evaluate
from bitscape.verbs.export import ExportReport, check_path, export
from bitscape.verbs.proxy import parted, proxy_of
from bitscape.verbs.quantize import quantize
from bitscape.verbs.search import search
from bitscape.words import amount, counted

_log = logging.getLogger("bitscape.verbs")

POLICY_SUFFIX = ".json"


@dataclass(frozen=True, kw_only=True)
class Form:
    """The network in float, at the bits found, or at uniform bits."""

    name: str
    """"float", "quantized" or "uniform"."""
    cost: Mapping[str, float]
    """Kind of cost -> what one sample costs."""
    evaluation: Evaluation
    """What was measured."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Compression(Shown):
    """What `compress` made."""

    result: SearchResult
    """Of the search; the files hold its policy."""
    network: nn.Module
    """Quantized."""
    forms: tuple[Form, ...]
    """Float, quantized and, where a uniform width fits the budget, uniform."""
    measured_on: str
    """What the forms were measured on."""
    files: tuple[ExportReport, ...]
    """Written and checked, without the policy file."""

    def table(self) -> Table:
        """Return the forms side by side, and the files."""
        first = self.forms[0].cost["weight_bytes"]
        rows = [
            [
                form.name,
                amount(form.cost["weight_bytes"], "B"),
                f"{first / form.cost['weight_bytes']:.1f}x",
                amount(form.cost["bitops"]),
                f"{form.evaluation.value:.4g}",
            ]
            for form in self.forms
        ]
        files = "; ".join(f"{report.path} {amount(report.file_bytes, 'B')}" for report in self.files)
        return Table(
            title=f"Compression, measured on {self.measured_on}",
            columns=["network", "weights", "smaller", "BitOps", self.forms[0].evaluation.metric],
            rows=rows,
            note=f"files: {files}" if files else "",
        )


def compress(
    model: nn.Module,
    data: Any,
    budget: BudgetText,
    to: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    method: str | SearchMethod = "fisher",
    repair: Literal["compensate", "adaptive"] | None = "compensate",
    task: TaskName | Literal["auto"] | Task = "auto",
    evaluation: Any = None,
    metric: Any = None,
    count: int = 256,
    inputs: Callable[[Any], Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Compression:
    """Search, quantize, measure and export, in one call.

    Args:
        model: float network; it is not changed.
        data: samples, preprocessed for the network; no labels are needed. See `search`.
        budget: caps, e.g. "4bit" or ["weight_bytes=1.2MB", "bitops=0.25x"]. See `search`.
        to: one or several files, told apart by the ends of their names: .json is the policy, the others are those of `export`.
        method: how bits are searched; see `search`.
        repair: how rounding is repaired; see `quantize`.
        task: what the outputs mean; see `search`.
        evaluation: data with targets on which the forms are measured, e.g. a validation loader. None: how far the outputs are
            from the float network's, on a quarter of the samples that neither search nor repair sees.
        metric: what is measured on `evaluation`; None: the task's own. See `evaluate`.
        count: most samples that are used.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        targets: from a batch to its targets.
        seed: of everything random.
        settings: further arguments of `search`: `candidates`, `pinned`, `keep_float`, `tied`, `target`, `latency`.

    Raises:
        InfeasibleBudget: no policy meets the budget.
        BitscapeError: any other argument that cannot be used, before the search begins; or a file that failed its check.
            Files that passed theirs before it stay.
    """
    paths = [Path(to)] if isinstance(to, str | os.PathLike) else [Path(path) for path in to]
    for path in paths:
        check_path(path, also=POLICY_SUFFIX)
    samples = proxy_of(model, data, count=count, inputs=inputs, targets=targets, seed=seed)
    seen, held_out = (samples, samples) if evaluation is not None else parted(samples)

    def measured(network: nn.Module) -> Evaluation:
        if evaluation is None:
            return evaluate(network, held_out, task="follow", reference=model)
        return evaluate(network, evaluation, task=task, metric=metric, inputs=inputs, targets=targets, seed=seed)

    def quantized(policy: Policy) -> nn.Module:
        return quantize(model, policy, seen, repair=repair, count=len(seen), seed=seed)

    _log.info("compress: searching bits on %s", counted(len(seen), "sample"))
    result = search(model, seen, budget, method=method, task=task, count=len(seen), seed=seed, **settings)
    _log.info("compress: quantizing, repairing and measuring")
    network = quantized(result.policy)
    forms = [
        Form(name="float", cost=_float_cost(result), evaluation=measured(model)),
        Form(name="quantized", cost=result.policy.cost, evaluation=measured(network)),
    ]
    if (uniform := _uniform(result)) is not None:
        forms.append(Form(name="uniform", cost=uniform.cost, evaluation=measured(quantized(uniform))))
    files = [_written(path, network, result.policy, seen, seed) for path in paths]
    return Compression(
        result=result,
        network=network,
        forms=tuple(forms),
        measured_on="the data for evaluation" if evaluation is not None else f"{counted(len(held_out), 'sample')} held out",
        files=tuple(report for report in files if report is not None),
    )


def _uniform(result: SearchResult) -> Policy | None:
    """The largest uniform width within the same caps; None where only other policies fit."""
    try:
        return Uniform().choose(result.choices, {}).policy
    except BitscapeError as error:
        _log.info("compress: no uniform policy to compare with: %s", error)
        return None


def _float_cost(result: SearchResult) -> dict[str, float]:
    network = result.choices.network
    return policy_cost(network, uniform_policy(network.shapes, LayerBits.FLOAT))


def _written(path: Path, network: nn.Module, policy: Policy, samples: Samples, seed: int) -> ExportReport | None:
    if path.suffix == POLICY_SUFFIX:
        policy.save(path)
        return None
    _log.info("compress: writing and checking %s", path)
    return export(network, path, samples, policy=policy, count=len(samples), seed=seed)
