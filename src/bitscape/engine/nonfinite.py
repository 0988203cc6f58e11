"""Where the first NaN or infinity came from, once a step has met one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call
from bitscape.errors import BitscapeError
from bitscape.nested import tensors_in


class NonFiniteError(BitscapeError):
    """A loss, gradient or output that is not finite. In training, the weights are those before the step that met it."""


def diagnose(model: nn.Module, images: Inputs) -> str:
    """Say in words what is not finite: the images, a weight, or else the first layer output of a forward run again.

    Runs the model on the inputs in its current mode, without gradients.
    """
    if not all(map(_finite, tensors_in(images))):
        return "the images themselves are not finite"
    bad_weights = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if bad_weights:
        return f"{len(bad_weights)} weight tensors are not finite, first {bad_weights[0]}"
    found: list[str] = []
    with torch.no_grad(), _watched(model, found):
        output = call(model, images)
    if found:
        return f"all weights are finite, activations are not: first the output of {found[0]}"
    if not all(map(_finite, tensors_in(output))):
        return "all weights and layer outputs are finite, the network's own output is not: it arises between layers"
    return "all weights and layer outputs are finite: it arises in the loss or in the backward pass"


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                found.append(f"layer {name!r} ({type(module).__name__})")

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
