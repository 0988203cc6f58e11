"""Running a network as it will be used, without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def in_eval_mode(model: Model) -> Model:
    """Put `model` in eval mode and return it: its own `eval` or `train` need not return anything."""
    model.eval()
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the network is in eval mode and builds no graph; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the training modes and buffers back at the end, also after an exception."""
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                # A buffer that is left alone is not written: it may be an expanded view, which cannot be.
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
        for module, training, buffers in modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(buffers)
