"""bs.compress: a float network, a few samples and a budget in; checked files and a comparison with uniform bits out."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from bitscape.cost.budget import BudgetText, lasting, split_drop
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.samples import Samples
from bitscape.engine.evaluate import Evaluation
from bitscape.engine.task import Task, TaskName
from bitscape.errors import BitscapeError, nearest
from bitscape.policy import WIDE_BITS, LayerBits, Policy, uniform_policy
from bitscape.runtimes.packages import check_packages
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchResult, quantizer_for
from bitscape.searches.uniform import Uniform
from bitscape.signatures import checked
from bitscape.tables import Shown, Table
from bitscape.verbs.evaluate import evaluate
from bitscape.verbs.export import ExportReport, check_path, export
from bitscape.verbs.proxy import parted, proxy_of
from bitscape.verbs.quantize import Repair, check_repair, quantize
from bitscape.verbs.search import MOST_EVALUATED, method_of, samples_for, search
from bitscape.words import amount, counted

_log = logging.getLogger("bitscape.verbs")

POLICY_SUFFIX = ".json"
SETTINGS = (
    "attention_products",
    "candidates",
    "channels_last",
    "folder",
    "keep_float",
    "latency",
    "pick",
    "pinned",
    "refine",
    "target",
    "tied",
)
"""Further arguments of `search` that `compress` hands on."""


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
    """Float, quantized and, where the budget is of caps and a uniform width fits them, uniform."""
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


@checked
def compress(
    model: nn.Module,
    data: Any,
    budget: BudgetText,
    to: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    method: str | SearchMethod = "fisher",
    repair: Repair | None = "compensate",
    repair_folder: str | os.PathLike[str] | None = None,
    task: TaskName | Literal["auto"] | Task = "auto",
    evaluation: Any = None,
    metric: Any = None,
    count: int | None = None,
    inputs: Callable[[Any], Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Compression:
    """Search, quantize, measure and export, in one call.

    Args:
        model: float network; it is not changed.
        data: samples, preprocessed for the network; no labels are needed. See `search`.
        budget: caps, e.g. "4bit" or ["weight_bytes=1.2MB", "bitops=0.25x"]; or a drop, e.g. "drop=0.5", which is measured on
            `evaluation`, and without it on the samples held out, which then need targets. See `search`.
        to: one or several files, told apart by the ends of their names: .json is the policy, the others are those of `export`.
        method: how bits are searched; see `search`.
        repair: what is done about the errors of rounding; see `quantize`.
        repair_folder: where "tune" and "reconstruct" keep their checkpoints; the same call goes on from there.
        task: what the outputs mean; see `search`.
        evaluation: data with targets on which the forms are measured, e.g. a validation loader. None: how far the outputs are
            from the float network's, on a quarter of the samples that neither search nor repair sees.
        metric: what is measured on `evaluation`; None: the task's own. See `evaluate`.
        count: most samples that are used; None: as many as `search` takes.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        targets: from a batch to its targets.
        seed: of everything random.
        settings: further arguments of `search`: `candidates`, `pinned`, `keep_float`, `tied`,
            `target`, `latency`, `pick`, `refine`, `attention_products`, `folder`, `channels_last`.

    Raises:
        InfeasibleBudget: no policy meets the budget.
        BitscapeError: any other argument that cannot be used, before the search begins; or a file that failed its check.
            Files that passed theirs before it stay.
    """
    paths = [Path(to)] if isinstance(to, str | os.PathLike) else [Path(path) for path in to]
    check_files(paths)
    check_repair(repair, repair_folder)
    _check(settings, evaluation, metric)
    _check_widths(paths, settings)
    budget = lasting(budget)
    drop, _ = split_drop(budget)
    if isinstance(evaluation, Iterator):
        evaluation = list(evaluation)  # it is measured on several times
    count = samples_for(method_of(method)) if count is None else count
    samples = proxy_of(model, data, count=count, inputs=inputs, targets=targets, seed=seed)
    seen, held_out = (samples, samples) if evaluation is not None else parted(samples)
    judge = _Judge(
        model=model,
        data=held_out if evaluation is None else evaluation,
        task=task if evaluation is not None or (drop is not None and held_out.labelled) else "follow",
        metric=metric,
        follows=evaluation is None or drop is not None,
        reading={} if evaluation is None else {"inputs": inputs, "targets": targets},
        seed=seed,
    )

    quantizer = quantizer_for(settings.get("latency"))

    def quantized(policy: Policy, name: str) -> nn.Module:
        folder = None if repair_folder is None else Path(repair_folder) / name
        return quantize(
            model,
            policy,
            seen,
            repair=repair,
            quantizer=quantizer,
            task=task,
            folder=folder,
            count=len(seen),
            seed=seed,
        )

    in_float = judge.evaluation(model)  # shows what is wrong with the data, the task and the metric
    _log.info("compress: searching bits on %s", counted(len(seen), "sample"))
    measuring = {} if drop is None else {"evaluation": judge.samples(), "metric": metric}
    result = search(model, seen, budget, method=method, task=task, count=len(seen), seed=seed, **measuring, **settings)
    _log.info("compress: quantizing, repairing and measuring")
    network = quantized(result.policy, "quantized")
    forms = [
        Form(name="float", cost=_float_cost(result), evaluation=in_float),
        Form(name="quantized", cost=result.policy.cost, evaluation=judge.evaluation(network)),
    ]
    if drop is None and (uniform := _uniform(result)) is not None:
        forms.append(Form(name="uniform", cost=uniform.cost, evaluation=judge.evaluation(quantized(uniform, "uniform"))))
    checked = _Checked(model, network, result.policy, seen, task, seed)
    files = [_written(path, checked) for path in paths]
    return Compression(
        result=result,
        network=network,
        forms=tuple(forms),
        measured_on="the data for evaluation" if evaluation is not None else f"{counted(len(held_out), 'sample')} held out",
        files=tuple(report for report in files if report is not None),
    )


def check_files(paths: Iterable[Path]) -> None:
    """Raise BitscapeError for files of unknown form, given twice, in folders that are not there, or whose packages are not installed."""
    paths = list(paths)
    counts = Counter(path.absolute() for path in paths)
    if twice := [str(path) for path, count in counts.items() if count > 1]:
        raise BitscapeError(f"to: {twice[0]} stands twice; give each file once")
    for path in paths:
        check_packages(check_path(path, also=POLICY_SUFFIX))


def _check(settings: Mapping[str, Any], evaluation: Any, metric: Any) -> None:
    """Raise BitscapeError for arguments that would fail after the search, or have no effect."""
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise BitscapeError(
            f"{unknown[0]}: compress has no such argument{nearest(unknown[0], SETTINGS)}; of search's it takes {', '.join(SETTINGS)}"
        )
    if metric is not None and evaluation is None:
        raise BitscapeError("metric: it is measured on evaluation=, which is missing; pass data with targets there, or leave metric out")


def _check_widths(paths: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Raise BitscapeError for 16-bit activations that a file could not hold, before they are searched for."""
    files = [path for path in paths if check_path(path, also=POLICY_SUFFIX) == "openvino"]
    offered = settings.get("candidates") or ()
    if files and (wide := [str(bits) for bits in offered if getattr(bits, "activation", None) == WIDE_BITS]):
        raise BitscapeError(
            f"candidates: {', '.join(wide)} have 16-bit activations, and OpenVINO computes in 8, but the file {files[0]} is for it; "
            "offer activations of 8 bits, or write .onnx or .safetensors"
        )


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """How the forms are measured."""

    model: nn.Module
    data: Any
    task: TaskName | Literal["auto"] | Task
    metric: Any
    follows: bool
    """Whether outputs that are followed are those of the float network, not targets."""
    reading: Mapping[str, Any]
    seed: int

    def evaluation(self, network: nn.Module) -> Evaluation:
        reference = self.model if self.follows and self.task == "follow" and self.metric is None else None
        return evaluate(
            network, self.data, task=self.task, metric=self.metric, reference=reference, seed=self.seed, **self.reading
        )

    def samples(self) -> Samples:
        """The same data in memory, for a search that measures."""
        return proxy_of(self.model, self.data, count=MOST_EVALUATED, seed=self.seed, **{"inputs": None, **self.reading})


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


@dataclass(frozen=True)
class _Checked:
    """What goes into the files, and what they are checked with."""

    model: nn.Module
    network: nn.Module
    policy: Policy
    samples: Samples
    task: TaskName | Literal["auto"] | Task
    seed: int

    @property
    def outputs(self) -> TaskName | Literal["auto"]:
        """What the outputs are, by name; those of a task of the user's are no classes."""
        if isinstance(self.task, str):
            return self.task
        return next((name for name in get_args(TaskName) if name == self.task.name), "follow")


def _written(path: Path, checked: _Checked) -> ExportReport | None:
    if path.suffix == POLICY_SUFFIX:
        checked.policy.save(path)
        return None
    _log.info("compress: writing and checking %s", path)
    return export(
        checked.network,
        path,
        checked.samples,
        policy=checked.policy,
        float_model=checked.model,
        task=checked.outputs,
        count=len(checked.samples),
        seed=checked.seed,
    )
