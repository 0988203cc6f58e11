"""What a few passes over two images tell of a network before work begins.

Whether it gives the same outputs twice, and whether each weight is used by its own layer alone.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from bitscape.calling import Inputs, call, moved, rows_of, sample_count
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.layers import quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.nested import tensors_in

TOLERANCE = 1e-3
"""Largest difference of two outputs that counts as rounding, relative to the largest output: float32 after a hundred layers."""
_IMAGES = 2
_REPEATS = 16
"""Passes in which random numbers may show: a block that is left out for one image in ten shows in 97 %."""
_OTHER_WEIGHT = 0.731
"""Stands in for every element of a weight outside of its layer."""


def check_repeatable(model: nn.Module, images: Inputs) -> None:
    """Raise BitscapeError where two runs of the network in eval mode differ, most often by random numbers.

    Two of the images (n, c, h, w), or of other inputs, are used. The random states of Python, numpy and torch stay as they are.
    """
    if is_empty(model):
        return
    with trial(model, images) as run:
        before = run.random_state()
        outputs = run()
        draws = run.random_state() != before
        if not any(differ(outputs, run()) for _ in range(_REPEATS if draws else 1)):
            return
    reason = "draws random numbers" if draws else "changes from one pass to the next"
    raise BitscapeError(
        f"model: it {reason} in eval mode, so two runs on the same images differ, and its outputs cannot be compared; "
        "leave that to training mode, e.g. F.dropout(x, p, self.training), or `if self.training:`"
    )


def check_weight_uses(model: nn.Module, images: Inputs) -> None:
    """Raise BitscapeError where a layer's weight is used outside of the layer too, naming the layer.

    There it would be the float weight in a quantized network, and the rounded one in a file. Found by two
    passes on two of the images (n, c, h, w); in the second, layers have their weight only while they run.
    """
    if is_empty(model):
        return
    layers = quantizable_layers(model)
    with trial(model, images) as run:
        expected = run.again()

        def used_outside(those: Iterable[nn.Module]) -> bool:
            with ExitStack() as block:
                for layer in those:
                    block.enter_context(_other_weight_outside(layer))
                try:
                    return differ(expected, run.again())
                except Exception:  # with the weight itself the same pass went through
                    return True

        if not used_outside(layers.values()) or differ(expected, run.again()):
            return
        names = [name for name, layer in layers.items() if used_outside([layer])]
    raise BitscapeError(
        f"model: the weight of layer {', '.join(map(repr, names))} is used outside of the layer too, as by "
        "F.linear(x, layer.weight.t()): there it would stay float in the network and be rounded in its files; "
        "call the layer instead, or give that use a parameter of its own"
    )


@dataclass(frozen=True)
class Trial:
    """Passes of one network over two images; random numbers begin at a fixed seed."""

    model: nn.Module
    images: Inputs
    device: torch.device

    def __call__(self) -> list[Tensor]:
        """Every tensor that the network returns."""
        with explained_forward(next(tensors_in(self.images))):
            return [tensor.clone() for tensor in tensors_in(call(self.model, self.images))]

    def again(self) -> list[Tensor]:
        """The same, with the random numbers of the first pass."""
        self.seed()
        return self()

    def seed(self) -> None:
        """Let random numbers begin anew."""
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(0)

    def random_state(self) -> tuple[object, ...]:
        """State of every global random generator that the network may draw from."""
        of_device = torch.cuda.get_rng_state(self.device).tolist() if self.device.type == "cuda" else None
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(), of_device


@contextmanager
def trial(model: nn.Module, images: Inputs) -> Iterator[Trial]:
    """Within the block the network is in eval mode without a graph; random states are put back at the end."""
    device = next(chain(model.parameters(), model.buffers(), tensors_in(images))).device
    two = rows_of(images, slice(0, _IMAGES), sample_count(images))
    run = Trial(model, moved(two, device), device)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
            run.seed()
            yield run
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def differ(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether two lists of outputs differ by more than float rounding."""
    return len(before) != len(after) or not all(map(_same, before, after))


def is_empty(model: nn.Module) -> bool:
    """Whether the network has no values to run with."""
    return any(parameter.is_meta for parameter in model.parameters())


def _same(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    if not before.is_floating_point():
        return torch.equal(before, after)
    finite = before[before.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(after, before, rtol=0.0, atol=TOLERANCE * largest, equal_nan=True)


@contextmanager
def _other_weight_outside(layer: nn.Module) -> Iterator[None]:
    """Within the block the layer has its weight while its forward runs, and another one at all other times."""
    weight = layer.get_parameter("weight")
    # A parameter of the layer alone, as `load_packed` gives it one: whoever else registered the weight keeps it.
    other = nn.Parameter(torch.full_like(weight, _OTHER_WEIGHT), requires_grad=weight.requires_grad)

    def put(parameter: nn.Parameter) -> Callable[..., None]:
        return lambda *_: layer._parameters.update(weight=parameter)

    handles = [
        layer.register_forward_pre_hook(put(weight), prepend=True),
        layer.register_forward_hook(put(other), always_call=True),
    ]
    layer._parameters["weight"] = other
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        layer._parameters["weight"] = weight
