"""One forward pass that records, per module, how often it ran, on how many elements, and the MACs it ran itself.

The network itself runs, on its own device, and its state is put back: the meta device would compute nothing, but torch
has the shapes of convolutions and norms there from its compiler, whose import takes longer than one sample.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bitscape.calling import Inputs, call, moved, shapes_of
from bitscape.errors import BitscapeError
from bitscape.models.dtypes import takes_indices
from bitscape.models.layers import QUANTIZABLE, WEIGHTED
from bitscape.models.modes import unchanged
from bitscape.nested import tensors_in


@dataclass
class ModuleRun:
    """What one module did in the pass."""

    calls: int = 0
    """Times it ran."""
    macs: int = 0
    """Multiply-accumulates it ran itself, without those of its child modules."""
    weight_macs: int = 0
    """Of a quantizable layer: multiply-accumulates with its weight, or what it made of it, in its calls; by child modules too."""
    counted_macs: int = 0
    """Those of `macs` that are among the `weight_macs` of a module."""
    input_elements: int = 0
    """Elements of its first input, in its largest call."""
    output_elements: int = 0
    """Elements of its output, in its largest call."""
    total_output_elements: int = 0
    """Elements of its output, all calls together."""
    is_head: bool = False
    """Of a quantizable layer: whether its output reaches one of the network's without passing another such layer."""


def dry_pass(model: nn.Module, sample: Inputs) -> dict[str, ModuleRun]:
    """Run `model` once in eval mode on one sample: its inputs as a batch of one, or the shape of one image without batch.

    Return module name -> what it did, in order of first call. Training mode, buffers and hooks of the model are as
    before afterwards. Raises BitscapeError when the forward fails.
    """
    run = _of_shape if is_shape(sample) else _of_inputs
    try:
        with unchanged(model):
            return run(model, sample)
    except Exception as error:
        raise BitscapeError(
            f"{_named(sample)} with {type(error).__name__}: {error}; input_shape is the shape of one image, without the batch dimension"
        ) from error


def is_shape(sample: Inputs) -> bool:
    """Whether `sample` is the shape of one image, not the inputs themselves."""
    return isinstance(sample, tuple) and next(tensors_in(sample), None) is None


def _named(sample: Inputs) -> str:
    if is_shape(sample):
        return f"input_shape={sample}: the network's forward fails on an input of shape {(1, *sample)}"
    return f"inputs: the network's forward fails on inputs of shapes {', '.join(map(str, shapes_of(sample)))}"


def _of_inputs(model: nn.Module, inputs: Inputs) -> dict[str, ModuleRun]:
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    return _record(model, moved(inputs, device))


def _of_shape(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, ModuleRun]:
    """A pass on an image; where that fails, and the network may take indices, on indices."""
    image = _image(model, input_shape)
    try:
        return _record(model, image)
    except Exception:
        if not takes_indices(model):
            raise
        return _record(model, torch.zeros_like(image, dtype=torch.int64))


def _image(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.empty(0)
    if like.is_meta:
        return torch.empty(1, *input_shape, dtype=like.dtype, device="meta")
    values = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    return values.to(device=like.device, dtype=like.dtype)


@contextmanager
def _countable() -> Iterator[None]:
    """Run encoder and recurrent layers as plain matrix products, and nothing compiled: their fused operations have no count."""
    mha, cudnn, mkldnn = torch.backends.mha, torch.backends.cudnn, torch.backends.mkldnn
    before = mha.get_fastpath_enabled(), cudnn.enabled, mkldnn.enabled
    mha.set_fastpath_enabled(False)
    cudnn.enabled = False
    mkldnn.enabled = False  # type: ignore[assignment]  # torch types the property as an attribute
    try:
        with _uncompiled():
            yield
    finally:
        mha.set_fastpath_enabled(before[0])
        cudnn.enabled, mkldnn.enabled = before[1:]


def _uncompiled() -> AbstractContextManager[Any]:
    """Keep torch's compiler from tracing the recorder; one that nobody has imported yet stays so, its import takes over a second."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _record(model: nn.Module, inputs: Inputs) -> dict[str, ModuleRun]:
    recorder = _Recorder()
    # Flags are set one by one because a user's own `train` method may do more than set them.
    for module in model.modules():
        module.training = False
    try:
        recorder.attach(model)
        with torch.no_grad(), _countable(), recorder:
            outputs = call(model, inputs)
    finally:
        recorder.detach()
    for name in recorder.makers.of(outputs):
        recorder.runs[name].is_head = True
    return recorder.runs


class _Makers:
    """Which quantizable layers last worked on the values of each tensor; views share their storage, and so their makers."""

    def __init__(self) -> None:
        self._names: dict[StorageWeakRef | Tensor, dict[str, int]] = {}
        """Storage -> layer -> how many calls came before."""
        self._calls = 0

    def made(self, name: str, output: Any) -> None:
        """A quantizable layer returned `output`."""
        self._calls += 1
        for tensor in tensors_in(output):
            self._set(tensor, {name: self._calls})

    def follow(self, operation: str, arguments: Any, result: Any) -> None:
        """An operation made `result`, or wrote into one of its arguments.

        A sum of two branches counts as the later layer's, as where a block adds its input; other operations hand on all.
        """
        names: dict[str, int] = {}
        for tensor in [] if operation.startswith("new_") or operation.endswith("_like") else _tensors(arguments):
            names |= self._names.get(_storage(tensor), {})
        if operation in _SUMS and names:
            names = dict([max(names.items(), key=lambda entry: entry[1])])
        for tensor in _tensors(result):
            self._set(tensor, names)

    def of(self, outputs: Any) -> list[str]:
        """Names of the layers that made `outputs`, in call order."""
        names: dict[str, int] = {}
        for tensor in tensors_in(outputs):
            names |= self._names.get(_storage(tensor), {})
        return sorted(names, key=lambda name: names[name])

    def _set(self, tensor: Tensor, names: dict[str, int]) -> None:
        self._names[_storage(tensor)] = names


_ATEN = torch.ops.aten
_COUNTED_AS = {_ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention}
"""Operations that torch has no count for -> one of the same arguments that it has one for."""
_SUMS = {"add", "add_", "sub", "sub_"}


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> StorageWeakRef | Tensor:
    """What views share, which the reference keeps neither in memory nor for another tensor; a sparse tensor stands for itself."""
    return StorageWeakRef(tensor.untyped_storage()) if tensor.layout is torch.strided else tensor


@dataclass
class _Call:
    """A call of a module that has not returned yet."""

    name: str
    weights: dict[int, Tensor]
    """Its weight and what was made of it, by identity; they are kept, so that no other tensor gets their identity."""


class _Recorder(TorchDispatchMode):
    """Hooks on every module, and on every operation while it is active, that fill `runs`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.runs: dict[str, ModuleRun] = {}
        self.makers = _Makers()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._open: list[_Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Let torch call the recorder directly: it would import its compiler only to keep it away; `_uncompiled` does that."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operation, one made of others as these."""
        kwargs = kwargs or {}
        count_flops = flop_registry.get(_COUNTED_AS.get(func.overloadpacket, func.overloadpacket))
        if count_flops is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self.makers.follow(str(func).partition(".")[2].partition(".")[0], (args, kwargs), result)
        self._count(0 if count_flops is None else count_flops(*args, **kwargs, out_val=result) // 2, (args, kwargs), result)
        return result

    def _count(self, macs: int, arguments: Any, result: Any) -> None:
        """Give an operation's MACs to the innermost open module; tell products with a weight from what makes another form of it."""
        if macs and self._open:
            self.runs[self._open[-1].name].macs += macs
        given = {id(value) for value in _tensors(arguments)}
        for outer in reversed(self._open):
            if given.isdisjoint(outer.weights):
                continue
            if macs:
                self.runs[outer.name].weight_macs += macs
                self.runs[self._open[-1].name].counted_macs += macs
                break
            outer.weights.update((id(made), made) for made in _tensors(result))

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, name), prepend=True))
            self._handles.append(module.register_forward_hook(partial(self._leave, name), with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        weight = module._parameters.get("weight") if isinstance(module, WEIGHTED) else None
        self._open.append(_Call(name, {} if weight is None else {id(weight): weight}))
        self.runs.setdefault(name, ModuleRun())

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._open.pop()
        run = self.runs[name]
        run.calls += 1
        given = args[0] if args else next(iter(kwargs.values()), None)
        run.input_elements = max(run.input_elements, _elements(given))
        run.output_elements = max(run.output_elements, _elements(output))
        run.total_output_elements += _elements(output)
        if isinstance(module, QUANTIZABLE):
            self.makers.made(name, output)


def _elements(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0
