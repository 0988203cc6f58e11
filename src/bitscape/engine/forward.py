"""The model's forward as the loop runs it: autocast, compiled, outputs read."""

import copy
import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call, moved, sample_count
from bitscape.data.samples import Minibatch
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.memory_format import set_memory_format
from bitscape.models.modes import evaluating
from bitscape.nested import tensors_in
from bitscape.quant.convert import bypassed

_log = logging.getLogger("bitscape.engine")

OUTPUT_BYTES = 1 << 27
"""Of a module in one pass of an evaluation. Four or five outputs are held at the same time."""


@contextmanager
def loop_forward(
    model: nn.Module, *, autocast: torch.dtype | None, compiled: bool, read: Callable[[Any, int], Any]
) -> Iterator[None]:
    """Inside the block the model runs under autocast, compiled if asked, and returns `read(output, samples)`.

    The instance's `forward` is shadowed, so hooks, names and `modules()` stay as they are, and a step that runs
    several passes gets each of them right: autocast's cache of cast weights ends with every call.
    """
    device = device_of(model)
    shadowed = vars(model).get("forward")
    inner = _compile(model.forward, device) if compiled else model.forward

    @functools.wraps(model.forward)
    def forward(*args: Any, **keywords: Any) -> Any:
        inputs: Inputs = args[0] if len(args) == 1 and not keywords else (*args, *keywords.values())
        with autocast_on(device, autocast), explained_forward(inputs):
            output = inner(*args, **keywords)
        return read(output, sample_count(inputs))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if shadowed is not None:
            model.forward = shadowed


def autocast_on(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    """Return the autocast context of `dtype`, or one that does nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def samples_at_once(model: nn.Module, inputs: Inputs, most: int) -> int:
    """How many samples go through the network together, for every module's output to keep within OUTPUT_BYTES.

    At least two, which some networks need, and at most `most`. A copy of the network tries two of the samples in
    `inputs`; one that cannot be copied, or does not take them, gets `most`.
    """
    largest = 1

    def see(_module: nn.Module, _inputs: object, output: Any) -> None:
        nonlocal largest
        largest = max(largest, *(tensor.nbytes for tensor in tensors_in(output)), 0)

    try:
        tried, trial = Minibatch(inputs).rows(slice(0, 2)), copy.deepcopy(model)
        for module in trial.modules():
            module.register_forward_hook(see)
        with evaluating(trial):
            call(trial, moved(tried.inputs, device_of(model)))
    except Exception:
        return most
    fitting = max(2, OUTPUT_BYTES * len(tried) // largest)
    if fitting < most:
        _log.info("%d samples at once, not %d: outputs on the way are large; batch_size says otherwise", fitting, most)
    return min(most, fitting)


def as_logits(output: object, images: int, highest_label: int) -> Tensor:
    """Return `output` in float32 if it is (images, classes) with a class for every label, else raise BitscapeError."""
    if not isinstance(output, Tensor):
        raise BitscapeError(f"the model returns {type(output).__name__}; it must return one tensor of logits (n, classes): wrap it")
    if output.ndim != 2 or output.shape[0] != images:
        raise BitscapeError(f"the model returns shape {tuple(output.shape)} for {images} images; allowed: (n, classes)")
    check_highest(highest_label, output.shape[1])
    return output.float()


def check_highest(label: int, classes: int) -> None:
    """Raise BitscapeError unless the model has an output for the label."""
    if label >= classes:
        raise BitscapeError(
            f"the dataset has label {label}, the model has outputs 0..{classes - 1}; "
            "use the dataset the model was made for, or give the model a head of the right size"
        )


def lay_out(model: nn.Module, inputs: Inputs, channels_last: bool | None, *, training: bool) -> bool:
    """Set the memory format by a batch of images, as `set_memory_format` does; return whether it is channels_last.

    A network of several inputs stays contiguous. Raises BitscapeError where channels_last is asked for, and the network does not take it.
    """
    if not isinstance(inputs, Tensor):
        if channels_last:
            raise BitscapeError(
                f"channels_last: True, and the network is called with a {type(inputs).__name__}; that memory format is for one tensor "
                "of images: leave channels_last out"
            )
        return False
    with bypassed(model, "input_quantizer"):  # a rounded activation would turn float noise into steps
        return set_memory_format(model, inputs, channels_last, training=training)


def check_autocast(autocast: torch.dtype | None) -> None:
    """Raise BitscapeError unless `autocast` is None or bfloat16; float16 would need loss scaling."""
    if autocast not in (None, torch.bfloat16):
        raise BitscapeError(f"autocast is {autocast}; allowed: None (float32) and torch.bfloat16")


def device_of(model: nn.Module) -> torch.device:
    """Return the one device of the model's parameters and buffers (the CPU if it has none); BitscapeError if two."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise BitscapeError(f"the model is spread over {sorted(map(str, devices))}; move it with model.to(device)")
    return devices.pop() if devices else torch.device("cpu")


def _compile(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        _log.warning("compile=True needs a C++ compiler and %r is not there; training uncompiled", compiler)
        return forward
    return torch.compile(forward)
