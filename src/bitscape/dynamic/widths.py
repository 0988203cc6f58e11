"""One tensor operation at several bit-widths, each image of a batch at its own: grouped, so that every group runs as static code does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Apply = Callable[[int, Tensor], Tensor]
"""(a whole width, (k, ...) of the images that need it) -> (k, ...)."""


@dataclass(frozen=True)
class Widths:
    """A bit-width for each of n images, whole or between two whole numbers."""

    below: Tensor
    """(n,), whole numbers."""
    share: Tensor | None = None
    """(n,) in 0..1, of the next width; carries the gradient. None: exactly `below`."""

    @property
    def value(self) -> Tensor:
        """(n,): below + share."""
        return self.below if self.share is None else self.below + self.share


def at_widths(x: Tensor, widths: Widths, apply: Apply) -> Tensor:
    """Return (1 - f) apply(b, x) + f apply(b + 1, x) for x (n, ...), with b and f of each image from `widths`.

    The slope in a width is apply(b + 1, x) - apply(b, x), so the loss has a gradient in the width itself. `apply` sees each image once
    for whole widths, twice otherwise; it must treat images apart.
    """
    below, share = widths.below, widths.share
    if share is None and bool((below == below[0]).all()):
        return apply(int(below[0]), x)
    found: Tensor | None = None
    for bits in sorted({*below.int().tolist(), *(() if share is None else (below + 1).int().tolist())}):
        at, above = below == bits, below + 1 == bits
        rows = (at if share is None else at | above).nonzero().squeeze(1)
        y = apply(bits, x.index_select(0, rows))
        if share is not None:
            y = y * _broadcast(torch.where(at, 1 - share, share)[rows], y)
        if found is None:
            found = y.new_zeros((len(x), *y.shape[1:]))
        found.index_add_(0, rows, y)
    assert found is not None
    return _laid_out_like(x, found)


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def _laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    # Groups are gathered and added up in plain layout, which is the faster way.
    return (
        y.contiguous(memory_format=torch.channels_last)
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and y.ndim == 4
        else y
    )
