"""SearchProblem: what a search method is given, checked at the door; SearchResult: what it returns."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call, sample_count, shapes_of
from bitscape.cost.budget import Budget, BudgetText
from bitscape.cost.latency import LatencyTable
from bitscape.cost.layers import NetworkProfile, measure
from bitscape.cost.targets import Target
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine.task import CLASSES, SAMPLE, Task, TaskName, task_of
from bitscape.errors import BitscapeError
from bitscape.models.dtypes import check_float32, check_images
from bitscape.models.layers import quantizable_layers
from bitscape.models.memory_format import set_memory_format
from bitscape.models.modes import evaluating, in_eval_mode
from bitscape.models.prepare import prepare
from bitscape.models.trial import check_repeatable, check_weight_uses
from bitscape.nested import tensors_in
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import batches_of
from bitscape.quant.layers import require_float
from bitscape.quant.quantizers import Lsq
from bitscape.searches.allocation import pareto_front
from bitscape.searches.choices import Choices
from bitscape.searches.freedom import Pins
from bitscape.searches.front import Front
from bitscape.searches.gain import Gain
from bitscape.searches.scores import ScoreTable
from bitscape.tables import Shown, Table
from bitscape.version import __version__
from bitscape.words import cost_text

_log = logging.getLogger("bitscape.searches")

Pick = Literal["best", "least-sharp"]
SearchOption = Literal["pick", "folder", "for_training"]
"""What only some methods take; each method's `options` lists its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchProblem:
    """A prepared float network, samples, and the bits that its layers may get; `SearchProblem.of` makes one."""

    prepared: nn.Module
    """A copy of the float network in eval mode, its attention split into layers that can take bits.

    A method that changes it puts it back.
    """
    samples: Samples
    """What the network is called with, perhaps with targets; on the network's device."""
    choices: Choices
    """Which bits each layer may get, within which budget."""
    task: TaskName | Literal["auto"] | Task = "auto"
    """What the outputs mean; "auto" decides by their shape, see `task_of`."""
    channels_last: bool | None = None
    """Memory format of the convolutions; None: channels_last, which is faster, where the network takes it."""
    seed: int = 0
    """Seed of everything random in the search."""
    quantizer: Lsq = field(default_factory=Lsq)
    """How weights will be laid on their grids."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        samples: Samples | Tensor,
        budget: Budget | BudgetText,
        *,
        candidates: Sequence[LayerBits] | None = None,
        pinned: Mapping[str, LayerBits | str] | Pins | None = None,
        keep_float: Sequence[str | type[nn.Module]] = (),
        tied: Sequence[Sequence[str]] = (),
        target: Target | None = None,
        latency: LatencyTable | None = None,
        along: str | None = None,
        task: TaskName | Literal["auto"] | Task = "auto",
        channels_last: bool | None = None,
        seed: int = 0,
        original: nn.Module | None = None,
    ) -> "SearchProblem":
        """Check everything before any search time is spent, and prepare a copy of the model.

        Args:
            model: float network; it is not changed.
            samples: preprocessed for the network, on its device. Costs are counted on the first one.
            budget, candidates, pinned, tied, target, latency, along: see `Choices.of`.
            keep_float: names, patterns or types of layers that stay float; of a type, its layers and those inside of it.
            task, channels_last, seed: see the fields.
            original: the network before it was prepared, in which types of `keep_float` are looked up; None = `model`.

        Raises:
            BitscapeError: a network that `models.prepare` refuses, draws random numbers in eval mode or uses a layer's
                weight elsewhere too; samples that it does not take or that are not finite; what `Choices.of` refuses.
        """
        if not isinstance(model, nn.Module):
            raise BitscapeError(f"model: {type(model).__name__} is no torch.nn.Module; pass the float network")
        require_float(model)
        check_float32(model)
        _check_finite(model)
        if not isinstance(samples, Samples):
            check_images(samples, model=model)
            samples = Samples.of(samples)
        check_samples(samples, model)
        if isinstance(task, str) and task not in (*get_args(TaskName), "auto"):
            raise BitscapeError(f"task={task!r}: allowed are 'auto', {', '.join(map(repr, get_args(TaskName)))}, or a task")
        prepared = _prepared(model, samples.first(2).parts[0].inputs, channels_last)
        choices = Choices.of(
            measure(prepared, samples.example),
            budget,
            candidates=candidates,
            pinned=pinned,
            keep_float=_names(keep_float, model if original is None else original, prepared),
            tied=tied,
            target=target,
            latency=latency,
            along=along,
        )
        _warn_of_bitops(choices)
        return cls(
            prepared=prepared,
            samples=samples,
            choices=choices,
            task=task,
            channels_last=channels_last,
            seed=seed,
            quantizer=quantizer_for(latency),
        )

    @property
    def network(self) -> NetworkProfile:
        """What each layer of `prepared` does for one sample."""
        return self.choices.network

    @property
    def free_layers(self) -> tuple[str, ...]:
        """Names of the layers to decide on, in call order."""
        return self.choices.free_layers

    @cached_property
    def labels(self) -> Tensor | None:
        """The targets of all samples where they are labels of classes, whole numbers (n,), as int64; else None."""
        targets = [part.targets for part in self.samples.parts]
        labels = [t for t in targets if isinstance(t, Tensor) and not t.is_floating_point() and t.ndim == 1]
        return torch.cat(labels).long() if len(labels) == len(targets) else None

    @cached_property
    def meaning(self) -> Task:
        """What the outputs of `prepared` mean: the task asked for, or the one that they suggest."""
        if not isinstance(self.task, str):
            return self.task
        task = task_of(self.prepared, next(batches_of(self.samples, self.prepared, SAMPLE)), self.task)
        if self.task == "auto":
            _log.info("the outputs are taken as task %s; --task or search(task=...) says otherwise", task.name)
        return task

    def decisions(self, samples: Samples) -> Tensor:
        """The float network's most likely class of each sample, int64 (n,)."""
        with evaluating(self.prepared):
            logits = [
                CLASSES.read(call(self.prepared, inputs), sample_count(inputs))
                for inputs in batches_of(samples, self.prepared)
            ]
        return torch.cat(logits).argmax(1)

    def provenance(self, method: Any) -> dict[str, Any]:
        """Describe a search by `method`, a settings dataclass: name, settings, seed, absolute budget, data, version."""
        return {
            "method": name_of(method),
            "settings": dataclasses.asdict(method),
            "seed": self.seed,
            "images": [len(self.samples), *self.network.input_shape],
            "task": self.task if isinstance(self.task, str) else self.task.name,
            **self.choices.provenance(),
            "version": __version__,
        }


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult(Shown):
    """What a search found."""

    policy: Policy
    """The policy, within the budget."""
    scores: ScoreTable | None
    """Scores from which any other budget is one `allocate` away; None if the method has none."""
    trace: tuple[Mapping[str, Any], ...]
    """What happened on the way, one record per step."""
    seconds: float
    """Wall-clock time of the search."""
    choices: Choices
    """What was chosen from: costs of the layers, candidates, pinned layers, budget."""
    gain: Gain | None = None
    """The most that mixed bits can win here; None where the method's scores do not tell it."""

    @cached_property
    def front(self) -> Front:
        """The best policy at each cost, solved when it is first asked for, in seconds.

        Costs are along the budget's first cap; of a drop without caps, weight bytes.

        Raises:
            BitscapeError: the method has no scores.
        """
        if self.scores is None:
            raise BitscapeError(
                f"front: method {self.policy.provenance.get('method')} has no scores, or all layers are pinned; use a method "
                "that scores, such as fisher"
            )
        kind = next(iter(self.choices.budget.caps), "weight_bytes")
        return pareto_front(self.scores, self.choices, kind).with_chosen(self.policy)

    def table(self) -> Table:
        """Return the table of the policy, with its costs beside the budget."""
        budget, table = self.policy.provenance.get("budget", {}), self.policy.table()
        costs = self.policy.cost.items()
        used = [f"{kind} {cost_text(kind, value)}{_of_cap(kind, budget)}" for kind, value in costs]
        title = f"SearchResult: {table.title.removeprefix('Policy: ')}, {self.seconds:.1f} s"
        return replace(table, title=title, note=", ".join(used))

    @property
    def gap(self) -> float | None:
        """Share of the score that the budget costs which a better policy could save at most; None for methods without scores."""
        return self.policy.provenance.get("gap")


def _of_cap(kind: str, budget: Mapping[str, float]) -> str:
    return f" (at most {cost_text(kind, budget[kind])})" if kind in budget else ""


def inputs_alone(samples: Samples) -> Minibatch:
    """Return all samples as one batch, without targets. Raises BitscapeError for samples of several shapes."""
    whole = Samples(Minibatch(part.inputs) for part in samples.parts)
    if len(whole.parts) == 1:
        return whole.parts[0]
    shapes = list(dict.fromkeys(str(Samples([part]).shapes) for part in whole.parts))
    raise BitscapeError(
        f"data: samples of shapes {' and '.join(shapes[:2])} do not stack into one batch, which this method needs; bring them to "
        "one shape, or use method fisher, hawq, kl or local with pick='best'"
    )


def whole_batch(samples: Samples) -> Minibatch:
    """Return all samples as one batch; targets stack, or are lists of one entry for each sample. Raises BitscapeError for others."""
    whole, parts = inputs_alone(samples), samples.parts
    if len(parts) == 1:
        return parts[0]
    if any(not isinstance(part.targets, list) or len(part.targets) != len(part) for part in parts):
        raise BitscapeError(
            "data: its targets do not stack into one batch; pass targets=, a function from a batch to a tensor or to a list of one "
            "entry for each sample, or set the method's task='follow', which needs none"
        )
    return Minibatch(whole.inputs, [target for part in parts for target in part.targets])


def quantizer_for(latency: LatencyTable | None) -> Lsq:
    """Return how weights are laid on their grids: as a compiler's table has them, where there is one."""
    return Lsq() if latency is None else Lsq(coarseness=latency.coarseness)


def name_of(method: Any) -> str:
    """Return the name by which users call a method."""
    return called(type(method).__name__)


def called(name: str) -> str:
    """Return the name by which users call a method whose class has this one: TrainedScores is trained-scores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def _names(keep_float: Sequence[str | type[nn.Module]], model: nn.Module, prepared: nn.Module) -> list[str]:
    """Names and patterns as they are; of each type the layers that are of it, or inside of a module of it."""
    names: list[str] = []
    for entry in keep_float:
        if isinstance(entry, str):
            names.append(entry)
        else:
            names += _layers_of_type(entry, model, prepared)
    return names


def _layers_of_type(kind: type[nn.Module], model: nn.Module, prepared: nn.Module) -> list[str]:
    holders = [name for name, module in model.named_modules() if isinstance(module, kind)]
    if not holders:
        raise BitscapeError(f"keep_float: the network has no {kind.__name__}; look at the types that print(model) shows")
    layers = quantizable_layers(prepared)
    return [name for name in layers if any(not holder or name == holder or name.startswith(f"{holder}.") for holder in holders)]


def _prepared(model: nn.Module, example: Inputs, channels_last: bool | None) -> nn.Module:
    prepared = in_eval_mode(prepare(model))
    check_repeatable(prepared, example)
    check_weight_uses(prepared, example)
    set_memory_format(prepared, example, channels_last)
    for parameter in prepared.parameters():  # curvature is asked for frozen weights too
        parameter.requires_grad_(parameter.is_floating_point())
    return prepared


def _warn_of_bitops(choices: Choices) -> None:
    target, kinds = choices.target, sorted(choices.budget.caps.keys() & {"bitops", "mean_activation_bits"})
    if target is not None and target.computes_int8 and kinds:
        _log.warning(
            "budget: a cap on %s says nothing about time on %s, which computes every layer in int8; "
            "cap weight_bytes, or latency_ms with a latency table",
            " and ".join(kinds),
            target.name,
        )


def _check_finite(model: nn.Module) -> None:
    buffers = ((name, buffer.nan_to_num(neginf=0.0, nan=torch.nan, posinf=torch.inf)) for name, buffer in model.named_buffers())
    for name, tensor in (*model.named_parameters(), *buffers):  # the minus infinity of a mask may stand in a buffer
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            broken = tensor[~tensor.isfinite()]
            raise BitscapeError(
                f"model: {name} holds {len(broken)} values that are not finite ({broken[0].item()} first); load a sound checkpoint"
            )


def check_samples(samples: Samples, model: nn.Module) -> None:
    """Raise BitscapeError for samples that the network does not take, that are not finite, or whose targets are not one each."""
    first = 0
    for part in samples.parts:
        if isinstance(part.inputs, Tensor):
            check_images(part.inputs, model=model)
        for tensor in tensors_in(part.inputs):
            _check_sample_values(tensor, first)
        if isinstance(part.targets, Tensor) and part.targets.ndim and len(part.targets) != len(part):
            raise BitscapeError(
                f"targets: shape {tuple(part.targets.shape)} for {len(part)} samples; give one for each sample, or none"
            )
        first += len(part)
    shapes = [shapes_of(part.rows(slice(0, 1)).inputs) for part in samples.parts]
    if any(shape != shapes[0] for shape in shapes):
        _log.warning("data: samples of several shapes; costs are counted on the first, %s", samples.shapes)


def _check_sample_values(values: Tensor, first: int) -> None:
    broken = ~values.isfinite()
    if broken.any():
        sample, *position = broken.nonzero()[0].tolist() if values.ndim else [0]
        axes = "(channel, row, column) " if values.ndim == 4 else ""
        raise BitscapeError(
            f"images: image {first + sample} holds {values[broken][0].item()} at {axes}{tuple(position)}; images must be finite; "
            "check how it was decoded and normalized, or leave it out"
        )
