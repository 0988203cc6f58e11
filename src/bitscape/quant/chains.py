"""Which call of a network feeds which, seen in one forward pass on an example.

Hooks on the modules without children, and a torch-function mode around everything else, note which call made each
tensor and which calls take it. Additions, concatenations and `F.relu` between the modules are calls too, so a tensor
with one user is known to have one.

Not seen: values that leave torch (`.item()`, NumPy), tensors that reach a module otherwise than by its arguments, and
branches that the example does not take. Whoever changes a network on the strength of this compares its outputs before
and after: `require_same`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitscape.calling import Inputs, call, first_rows, moved
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_float32, check_inputs
from bitscape.models.layers import WEIGHTED
from bitscape.models.modes import evaluating
from bitscape.models.trial import TOLERANCE
from bitscape.nested import tensors_in
from bitscape.quant.layers import QuantizedLayer
from bitscape.quant.reference import HALF

HALF_TOLERANCE = 2.0**-5
"""The same for a network that autocasts within its forward: bfloat16 after a few layers."""


@dataclass(eq=False)
class Call:
    """One call of a module without children, or of a torch function between the modules."""

    name: str
    """The module's name in the network, or the function's own; "output" stands for the caller of the network."""
    module: nn.Module | None
    """None for functions."""
    input: Tensor | None
    """The first tensor taken; later in-place functions may have changed its values."""
    sources: list["Call"]
    """The calls that made the tensors taken; the network's input has none."""
    users: list["Call"] = field(default_factory=list)
    """The calls that take what this one made, each once for every tensor taken."""


@dataclass(frozen=True)
class Chain:
    """Two layers, and the calls between them, in which every tensor has exactly one user."""

    first: Call
    between: tuple[Call, ...]
    last: Call


def record_calls(model: nn.Module, example: Inputs) -> list[Call]:
    """Run `model` once in eval mode on the first sample of `example`, of `checked_example`; return its calls in order."""
    recorder, sample = _Recorder(), first_rows(example, 1)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) or next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leave_as(name)))
    try:
        with evaluating(model), recorder:
            output = call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    recorder.add("output", None, output, recorder.makers(output), made=None)
    return recorder.calls


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._maker: dict[int, Call] = {}
        self._alive: list[Any] = []  # so that no id is given twice
        self._taken: list[Any] = []  # arguments of the modules that run now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sources = self.makers((args, kwargs))
        result = func(*args, **(kwargs or {}))
        # What returns no tensor (`x.shape`) is no use of the values.
        if not self._taken and next(tensors_in(result), None) is not None:
            self.add(getattr(func, "__name__", str(func)), None, (args, kwargs), sources, result)
        return result

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # An in-place module returns the tensor it took: whose it was must be asked before.
        self._taken.append(((args, kwargs), self.makers((args, kwargs))))

    def leave_as(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            taken, sources = self._taken.pop()
            if not self._taken:
                self.add(name, module, taken, sources, output)

        return leave

    def makers(self, taken: Any) -> list[Call]:
        return [self._maker[id(t)] for t in tensors_in(taken) if id(t) in self._maker]

    def add(self, name: str, module: nn.Module | None, taken: Any, sources: list[Call], made: Any) -> None:
        call = Call(name, module, next(tensors_in(taken), None), sources)
        for source in sources:
            source.users.append(call)
        for tensor in tensors_in(made):
            self._maker[id(tensor)] = call
        self._alive.append((taken, made))
        self.calls.append(call)


def only_user(call: Call) -> Call | None:
    """The one call that takes what `call` made; None if there are several, or none."""
    return call.users[0] if len(call.users) == 1 else None


def called_once(calls: list[Call]) -> set[nn.Module]:
    """The modules that ran exactly once: what is changed in them changes nothing elsewhere."""
    counts = Counter(call.module for call in calls if call.module is not None)
    return {module for module, count in counts.items() if count == 1}


def layer_chains(calls: list[Call], passes: Callable[[Call], bool]) -> list[Chain]:
    """Chains of two convolutions or linear layers, each called once, with nothing but calls that `passes` accepts between them."""
    once = called_once(calls)
    chains = []
    for first in calls:
        if first.module not in once or not isinstance(first.module, WEIGHTED):
            continue
        between: list[Call] = []
        call = only_user(first)
        while call is not None and passes(call) and len(call.sources) == 1:
            between.append(call)
            call = only_user(call)
        if call is not None and call.module in once and isinstance(call.module, WEIGHTED):
            chains.append(Chain(first, tuple(between), call))
    return chains


def shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that are registered in more than one place."""
    counts = Counter(p for _, p in _places(model))
    return {parameter for parameter, count in counts.items() if count > 1}


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield module, parameter


def outputs_of(model: nn.Module, example: Inputs) -> list[Tensor]:
    """Every tensor that the network returns for `example`, of `checked_example`, in eval mode.

    Raises BitscapeError for values that are NaN, with which nothing can be compared; a mask may well be infinite.
    """
    torch.clear_autocast_cache()  # within an autocast block it would hold weights as they were before a change in place
    with evaluating(model), explained_forward(example):
        outputs = [tensor.detach().clone() for tensor in tensors_in(call(model, example))]
    if any(bool(tensor.isnan().any()) for tensor in outputs):
        raise BitscapeError("example: the network's outputs on it hold NaN; check the images, their normalization and the checkpoint")
    return outputs


def tolerance_of(calls: list[Call]) -> float:
    """Largest relative difference of outputs that counts as rounding in a network that makes these calls."""
    return HALF_TOLERANCE if any(call.input is not None and call.input.dtype in HALF for call in calls) else TOLERANCE


def same(before: list[Tensor], after: list[Tensor], tolerance: float = TOLERANCE) -> bool:
    """Whether two lists of outputs agree up to float rounding."""
    return all(_difference(a, b) <= tolerance for a, b in zip(before, after, strict=True))


def require_same(before: list[Tensor], after: list[Tensor], *, what: str, reason: str, tolerance: float = TOLERANCE) -> None:
    """Raise BitscapeError if `what` changed the outputs by more than float rounding; `reason` says why it may have."""
    if not same(before, after, tolerance):
        worst = max(_difference(a, b) for a, b in zip(before, after, strict=True))
        raise BitscapeError(f"{what} changed the network's output by {worst:.2g} of its largest value: {reason}")


def _difference(before: Tensor, after: Tensor) -> float:
    """Largest difference in units of the largest value; of what is no float, such as classes, 0 if all are equal, else infinite."""
    if not before.is_floating_point():
        return 0.0 if torch.equal(before, after) else math.inf
    finite = before.isfinite()
    if not torch.equal(finite, after.isfinite()) or not torch.equal(before[~finite], after[~finite]):
        return math.inf
    before, after = before[finite], after[finite]
    if not before.numel():
        return 0.0
    return float((after - before).abs().max() / before.abs().max().clamp(min=torch.finfo(before.dtype).tiny))


def checked_example(example: Samples | Inputs, model: nn.Module) -> Inputs:
    """The inputs of `example` on the model's device; of samples the first ones, of one shape.

    Raises BitscapeError for a model or inputs that are not float32, or no sample.
    """
    check_float32(model)
    inputs = example.parts[0].inputs if isinstance(example, Samples) else example
    check_inputs(inputs, "example", model=model)
    return moved(inputs, next((p.device for p in model.parameters()), next(tensors_in(inputs)).device))
