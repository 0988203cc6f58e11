"""How far two networks agree on images: classes, and outputs to the last bit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError

Array = NDArray[Any]
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What two networks' outputs for the same images have in common."""

    images: int
    """Images compared."""
    same_class: float
    """Share of images with the same largest output."""
    identical: float
    """Share of images with equal outputs, bit for bit."""
    difference: float
    """Norm of the outputs' difference over the norm of the expected outputs."""


def agreement(expected: Array, found: Array) -> Agreement:
    """Compare outputs (n, classes). Raises BitscapeError for other or different shapes."""
    if expected.shape != found.shape or expected.ndim != 2 or not len(expected):
        raise BitscapeError(f"outputs of shapes {expected.shape} and {found.shape}: give two equal ones (images, classes)")
    return Agreement(
        images=len(expected),
        same_class=float((expected.argmax(1) == found.argmax(1)).mean()),
        identical=float((expected == found).all(1).mean()),
        difference=float(np.linalg.norm(found - expected)) / max(TINY, float(np.linalg.norm(expected))),
    )
