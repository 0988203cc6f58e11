"""What images cost on a network whose bits depend on them, noted while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from bitscape.errors import BitscapeError


@dataclass(frozen=True, eq=False)
class Spent:
    """What each of n images of a batch cost."""

    bits: Tensor
    """(n,), mean activation bit-width of each image, weighted as the network defines it."""
    bitops: Tensor
    """(n,), BitOps of each image, its share of the decision on its bits among them."""
    tiers: Tensor | None = None
    """(n,), which of several networks each image was sent to, from 0; None for a network that does not choose among any."""


@runtime_checkable
class Spending(Protocol):
    """A network whose bits depend on the image."""

    spent: Spent
    """Of the last batch; set by each forward in eval mode."""


@contextmanager
def noting_spent(model: nn.Module) -> Iterator[list[Spent]]:
    """Within the block, each batch of images that `model` runs adds to the list what they cost; nothing is added unless it is spending.

    A forward raises BitscapeError where its `spent` does not hold one number an image.
    """
    noted: list[Spent] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(module, Spending) and isinstance(spent := module.spent, Spent):  # others may call something else so
            _check(spent, len(inputs[0]))
            noted.append(spent)

    handle = model.register_forward_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


def _check(spent: Spent, images: int) -> None:
    for name, values in (("bits", spent.bits), ("bitops", spent.bitops)):
        if values.shape != (images,):
            raise BitscapeError(f"spent.{name} has shape {tuple(values.shape)} after {images} images; the network must set ({images},)")
