"""Two passes over one batch that differ in the weights alone: same masks, same arithmetic, buffers updated once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RandomState = dict[torch.device, Tensor]
"""Device -> state of its random generator; always the CPU, and the GPUs that hold the model."""


def random_state(model: nn.Module) -> RandomState:
    """Return the present random state, to be read before the first pass."""
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return {torch.device("cpu"): torch.get_rng_state()} | {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}


def set_random_state(state: RandomState) -> None:
    """Go back to what `random_state` returned."""
    for device, values in state.items():
        torch.set_rng_state(values) if device.type == "cpu" else torch.cuda.set_rng_state(values, device)


@contextmanager
def repeating(model: nn.Module, state: RandomState) -> Iterator[None]:
    """Within the block a pass repeats the one that began at `state`: dropout draws the same masks, and nothing is counted twice.

    Every buffer of the model (running statistics of norms, counters, trackers of its own) is a copy, and the untouched original
    afterwards. Modes stay: norms in training mode use the statistics of the batch or image.
    """
    kept = [(m, name, buffer) for m in model.modules() for name, buffer in m.named_buffers(recurse=False, remove_duplicate=False)]
    copies = {id(buffer): buffer.clone() for _, _, buffer in kept}  # modules that share a buffer share its copy
    try:
        for module, name, buffer in kept:
            setattr(module, name, copies[id(buffer)])
        set_random_state(state)
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


@contextmanager
def faithful(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block hooks are called also in a compiled network, and `layers` compute in float32 whatever autocast says.

    A compiled forward does not see hooks that came after it. A perturbation of a thousandth of the weights would not survive
    bfloat16, which rounds to 1 part in 256.
    """
    with torch.compiler.set_stance("force_eager"), in_float32(layers):
        yield


def in_float32(layers: Iterable[nn.Module]) -> ExitStack:
    """Let `layers` compute in float32 whatever autocast says, until the returned stack is closed."""
    open_regions: list[torch.autocast] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kind = next((v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), "cpu")
        lifted = torch.is_autocast_enabled(kind)
        open_regions.append(torch.autocast(kind, enabled=False))
        open_regions[-1].__enter__()
        return (tuple(map(_float32, args)), {name: _float32(v) for name, v in kwargs.items()}) if lifted else (args, kwargs)

    def leave(*_: object) -> None:
        open_regions.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(UncopiedHook(enter), with_kwargs=True))
            # In front of earlier ones: blocks may be nested, and regions end in reverse order.
            stack.enter_context(layer.register_forward_hook(UncopiedHook(leave), always_call=True, prepend=True))
        return stack.pop_all()


class UncopiedHook:
    """A hook of one module that does nothing on copies of the module, nor when the module is read from a file."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        """Call the hook."""
        return self.hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell copy and pickle what stands for the hook."""
        return _idle_hook, ()


def _idle_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: object) -> None:
    return None


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value
