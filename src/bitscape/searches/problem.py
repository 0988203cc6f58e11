"""SearchProblem: everything a search method is given, checked at the door; SearchResult: what it returns."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bitscape.cost.budget import Budget, parse_budget
from bitscape.cost.latency import LatencyTable, with_latency
from bitscape.cost.layers import NetworkProfile, measure
from bitscape.cost.policy_cost import layer_latency_ns
from bitscape.cost.targets import Target
from bitscape.engine.forward import as_logits
from bitscape.engine.task import SAMPLE, Task, TaskName, task_of
from bitscape.errors import BitscapeError, nearest
from bitscape.models.dtypes import check_float32, check_images
from bitscape.models.memory_format import set_memory_format
from bitscape.models.modes import evaluating, in_eval_mode
from bitscape.models.prepare import prepare
from bitscape.models.trial import check_repeatable, check_weight_uses
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import batches_of
from bitscape.quant.layers import require_float
from bitscape.searches.front import Front
from bitscape.searches.scores import ScoreTable, check_candidates
from bitscape.tables import Shown, Table
from bitscape.version import __version__
from bitscape.words import cost_text

__all__ = ["DEFAULT_CANDIDATES", "FreeLayers", "ScoreTable", "SearchProblem", "SearchResult", "free_layers"]

_log = logging.getLogger("bitscape.searches")

DEFAULT_WIDTHS = (2, 3, 4, 5, 6, 8)
DEFAULT_CANDIDATES = tuple(LayerBits(w, a) for w, a in product(DEFAULT_WIDTHS, DEFAULT_WIDTHS))
DEFAULT_PIN = LayerBits(8, 8)
Pick = Literal["best", "least-sharp"]


@dataclass(frozen=True)
class FreeLayers:
    """Which layers the search decides on."""

    groups: tuple[tuple[str, ...], ...]
    """Free layers in call order; those of one group share one pair of bits."""
    pinned: Mapping[str, LayerBits]
    """The other layers and their bits, layers tied to a pinned one included."""


def free_layers(network: NetworkProfile, pinned: Mapping[str, LayerBits] | None = None, tied: Sequence[Sequence[str]] = ()) -> FreeLayers:
    """Sort the layers of `network` into pinned ones and groups that share one pair.

    `pinned=None` pins the first and the last layer at 8/8, `{}` pins none. Layers that share one weight parameter are
    tied anyway. Raises BitscapeError for unknown or never-called names and for tied layers pinned to different bits.
    """
    if pinned is None:
        pinned = dict.fromkeys(network.ends, DEFAULT_PIN)
    for name, bits in pinned.items():
        _check_name("pinned", name, network)
        if not isinstance(bits, LayerBits):
            raise BitscapeError(f"pinned: layer {name!r} has {bits!r}; write e.g. LayerBits(8, 8)")
    groups = _merged(network, tied)
    spread = {name: bits for group in groups for name, bits in _pins_of_group(group, pinned).items()}
    return FreeLayers(tuple(group for group in groups if group[0] not in spread), spread)


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchProblem:
    """A float network, proxy images and a budget.

    The model is never changed: methods work on `prepared`. Raises BitscapeError for a network that `models.prepare` refuses,
    draws random numbers in eval mode or uses a layer's weight elsewhere too, images that the network does not
    take or that are not finite, unknown layer names, contradicting pins, budgets that cannot be read, and pairs of bits that the
    latency table or the target does not have.
    """

    model: nn.Module
    """Float network."""
    images: Tensor
    """Proxy images, float32 (n, c, h, w) or of whatever shape (n, ...) the network takes, normalized for it, at the target's input size."""
    budget: str | Sequence[str] | Mapping[str, float | str]
    """One or several caps, e.g. "bitops=0.25x" or ["bitops=w4a4", "weight_bytes=1.2MB"]; all must hold."""
    candidates: tuple[LayerBits, ...] = DEFAULT_CANDIDATES
    """Pairs of bit-widths a layer may get; default: all pairs of 2, 3, 4, 5, 6 and 8 bits, of these what the target has."""
    pinned: Mapping[str, LayerBits] | None = None
    """Layers with fixed bits; None pins the first and the last at 8/8, {} pins none."""
    tied: Sequence[Sequence[str]] = ()
    """Groups of layers that must get the same bits."""
    for_training: bool = False
    """Whether the quantized network will be trained afterwards; methods may then score differently."""
    task: TaskName | Literal["auto"] = "auto"
    """What the outputs mean: "classes", "binary" or "follow"; "auto" decides by their shape, see `task_of`."""
    seed: int = 0
    """Seed of everything random in the search."""
    labels: Tensor | None = None
    """Labels of the images, int64 (n,), of the network's classes or of others; no method needs them, those that train use them."""
    pick: Pick = "best"
    """Which of the policies with near-equal scores to take: the best-scored, or the one whose quantized network is least sharp."""
    folder: str | os.PathLike[str] | None = None
    """Where a method that trains keeps its checkpoint and the policy so far; the same search goes on from there. None: nowhere."""
    latency: LatencyTable | None = None
    """Measured times of this network: makes `latency_ms` a cost and a cap. Every pair offered or pinned must have been measured."""
    channels_last: bool | None = None
    """Memory format of the convolutions; None: channels_last, which is faster, where the network takes it."""
    target: Target | None = None
    """Target that the network ends on, e.g. TARGETS["openvino"]: only bits that it stores and computes are offered. None: any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if not isinstance(self.model, nn.Module):
            raise BitscapeError(f"model: {type(self.model).__name__} is no torch.nn.Module; pass the float network")
        require_float(self.model)
        _check_budget(self.budget)
        check_candidates(self.candidates)
        check_float32(self.model)
        _check_finite(self.model)
        _check_images(self.images, self.model)
        _check_labels(self.labels, len(self.images))
        if self.task not in (*get_args(TaskName), "auto"):
            raise BitscapeError(f"task={self.task!r}: allowed are 'auto', {', '.join(map(repr, get_args(TaskName)))}")
        if self.pick not in get_args(Pick):
            raise BitscapeError(f"pick={self.pick!r}: allowed are {', '.join(map(repr, get_args(Pick)))}")
        if self.latency is not None and not isinstance(self.latency, LatencyTable):
            raise BitscapeError(f"latency: {self.latency!r} is no LatencyTable; read the file: LatencyTable.load(path)")
        if self.target is not None:
            self._keep_to(self.target)
        # Evaluated now, so that a wrong name, shape or budget fails before any search time is spent.
        budget = self.parsed_budget
        if self.latency is not None:
            _check_measured(self.network, self.candidates, self.freedom)
        if self.target is not None:
            self.target.check_pinned(self.pinned_layers, self.network)
            _warn_of_bitops(budget, self.target)

    def _keep_to(self, target: Target) -> None:
        """Offer what the target has, and pin the layers to which it gives 8 bits."""
        if not isinstance(target, Target):
            raise BitscapeError(f'target: {target!r} is no Target; take one of TARGETS, e.g. TARGETS["openvino"]')
        if self.candidates is DEFAULT_CANDIDATES:  # by identity: the same pairs given by the user are checked
            object.__setattr__(self, "candidates", tuple(filter(target.allows, self.candidates)))
        target.check("candidates", self.candidates)
        given = dict.fromkeys(self.network.ends, DEFAULT_PIN) if self.pinned is None else self.pinned
        object.__setattr__(self, "pinned", {**target.pins(self.network), **given})

    @cached_property
    def prepared(self) -> nn.Module:
        """A copy of the model in eval mode, its attention split into layers that can take bits, in its memory format.

        Made once: a method that changes it puts it back.
        """
        prepared = in_eval_mode(prepare(self.model))
        check_repeatable(prepared, self.images)
        check_weight_uses(prepared, self.images)
        set_memory_format(prepared, self.images, self.channels_last)
        for parameter in prepared.parameters():  # curvature is asked for frozen weights too
            parameter.requires_grad_(parameter.is_floating_point())
        return prepared

    @cached_property
    def network(self) -> NetworkProfile:
        """What each layer of `prepared` does for one of the images."""
        measured = measure(self.prepared, tuple(self.images.shape[1:]))
        return measured if self.latency is None else with_latency(measured, self.latency)

    @cached_property
    def freedom(self) -> FreeLayers:
        """Pinned layers and groups of free ones."""
        return free_layers(self.network, self.pinned, self.tied)

    @property
    def pinned_layers(self) -> Mapping[str, LayerBits]:
        """Pinned layer -> bits, with the default resolved and layers tied to pinned ones included."""
        return self.freedom.pinned

    @property
    def free_layers(self) -> tuple[str, ...]:
        """Names of the layers to decide on, in call order."""
        return tuple(name for name in self.network.by_name if name not in self.pinned_layers)

    @cached_property
    def parsed_budget(self) -> Budget:
        """The budget as absolute caps."""
        return parse_budget(self.budget, self.network, self.pinned_layers)

    @cached_property
    def meaning(self) -> Task:
        """What the outputs of `prepared` mean: the task asked for, or the one that they suggest."""
        task = task_of(self.prepared, next(batches_of(self.images, self.prepared, SAMPLE)), self.task)
        if self.task == "auto":
            _log.info("the outputs are taken as task %s; --task or SearchProblem(task=...) says otherwise", task.name)
        return task

    @cached_property
    def decisions(self) -> Tensor:
        """The float network's most likely class of each proxy image, int64 (n,), on the device of `images`."""
        with evaluating(self.prepared):
            logits = [as_logits(self.prepared(batch), len(batch), highest_label=-1) for batch in batches_of(self.images, self.prepared)]
        return torch.cat(logits).argmax(1).to(self.images.device)

    def provenance(self, method: Any) -> dict[str, Any]:
        """Describe a search by `method`, a settings dataclass: name, settings, seed, absolute budget, version.

        Raises BitscapeError if the problem asks for what the method cannot do.
        """
        _check_has_use(self, method)
        return {
            "method": _name_of(method),
            "settings": dataclasses.asdict(method),
            "seed": self.seed,
            "budget": dict(self.parsed_budget.caps),
            "images": list(self.images.shape),
            "for_training": self.for_training,
            "pick": self.pick,
            "task": self.task,
            **({} if self.latency is None else {"latency": self.latency.source()}),
            **({} if self.target is None else {"target": self.target.name}),
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
    solve_front: Callable[[], Front] | None = None
    """Solves the front of the scores; None if the method has none."""

    @cached_property
    def front(self) -> Front:
        """The best policy at each cost, along the budget's first cap; solved when it is first asked for, in seconds.

        Raises:
            BitscapeError: the method has no scores.
        """
        if self.solve_front is None:
            raise BitscapeError(
                f"front: method {self.policy.provenance.get('method')} has no scores, or all layers are pinned; use a method "
                "that scores, such as fisher"
            )
        return self.solve_front().with_chosen(self.policy)

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


def _name_of(method: Any) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(method).__name__).lower()


def _check_has_use(problem: SearchProblem, method: Any) -> None:
    if problem.pick != "best" and not hasattr(method, "score"):
        raise BitscapeError(
            f"pick={problem.pick!r}: {_name_of(method)} has no scores, so there are no near-equal policies to pick from; "
            "use pick='best', or a method with scores"
        )
    if problem.folder is not None and not hasattr(method, "train_mixture"):
        raise BitscapeError(
            f"folder={os.fspath(problem.folder)!r}: {_name_of(method)} does not train and keeps nothing there; "
            "leave folder out, or use a method that trains, such as differentiable"
        )


def _check_name(argument: str, name: str, network: NetworkProfile) -> None:
    if name in network.uncalled:
        raise BitscapeError(f"{argument}: the network never calls layer {name!r}: its bits have no effect; leave it out")
    if name not in network.by_name:
        raise BitscapeError(f"{argument}: the network has no layer {name!r}{nearest(str(name), network.by_name)}")


def _merged(network: NetworkProfile, tied: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Join ties that overlap; every layer is in one group, groups and their layers are in call order."""
    group_of = {name: {name} for name in network.by_name}
    for tie in [*tied, *network.tied]:
        if isinstance(tie, str) or len(tie) < 2:
            raise BitscapeError(f"tied: {tie!r} is no group of layers; write e.g. [('layer1.conv1', 'layer2.conv1')]")
        for name in tie:
            _check_name("tied", name, network)
        together = set().union(*(group_of[name] for name in tie))
        group_of.update(dict.fromkeys(together, together))
    ordered = (tuple(name for name in group_of if name in group) for group in group_of.values())
    return list(dict.fromkeys(ordered))


def _pins_of_group(group: tuple[str, ...], pinned: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
    given = {name: pinned[name] for name in group if name in pinned}
    if len(set(given.values())) > 1:
        shown = ", ".join(f"{name} at {bits}" for name, bits in given.items())
        raise BitscapeError(
            f"pinned: layers that are tied, or share one weight, are pinned to different bits ({shown}); pin them to the same"
        )
    return dict.fromkeys(group, next(iter(given.values()))) if given else {}


def _check_budget(budget: object) -> None:
    texts = [budget] if isinstance(budget, (str, Mapping)) or not isinstance(budget, Sequence) or isinstance(budget, bytes) else budget
    for text in texts:
        if not isinstance(text, (str, Mapping)):
            raise BitscapeError(f'budget: {text!r} is no text; give caps such as "bitops=0.25x", or a mapping from kind to value')


def _check_measured(network: NetworkProfile, candidates: Sequence[LayerBits], freedom: FreeLayers) -> None:
    for layer in network.layers:
        for bits in [freedom.pinned[layer.name]] if layer.name in freedom.pinned else candidates:
            layer_latency_ns(layer, bits)  # names the pair that was not measured


def _warn_of_bitops(budget: Budget, target: Target) -> None:
    if target.computes_int8 and (kinds := sorted(budget.caps.keys() & {"bitops", "mean_activation_bits"})):
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


def _check_images(images: Tensor, model: nn.Module) -> None:
    check_images(images, model=model)
    broken = ~images.isfinite()
    if broken.any():
        image, *position = broken.nonzero()[0].tolist()
        axes = "(channel, row, column) " if images.ndim == 4 else ""
        value = images[image, *position].item()
        raise BitscapeError(
            f"images: image {image} holds {value} at {axes}{tuple(position)}; images must be finite; "
            "check how it was decoded and normalized, or leave it out"
        )


def _check_labels(labels: Tensor | None, images: int) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (images,):
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise BitscapeError(f"labels: {found}; give one int64 label per image, shape ({images},), or None")
