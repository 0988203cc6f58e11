"""One tensor quantized, forward and backward, by several means: why the kernels are native ones."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed_clock import clocked
from bitscape.quant import reference
from bitscape.quant.grid import Grid
from bitscape.quant.kernels import native
from bitscape.quant.reference import Gradients

Forward = Callable[[Tensor, Tensor, Grid], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Grid], Gradients | Tensor]

SHAPE = (8, 96, 112, 112)
"""The largest tensor of MobileNetV2 on 8 images of 224 pixels: 38 MB in float32."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPES_OF = {
    "native": ("float32", "bfloat16"),
    "definition": ("float32", "bfloat16"),
    "torch.compile": ("float32", "bfloat16"),
    "numba": ("float32",),  # it has no bfloat16
    "copy": ("float32", "bfloat16"),
}
"""Each means, and the types that it works on."""


def measure_kernel(run: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Median milliseconds of both passes.

    Start-up is the first call of both, with what it imports and compiles.
    """
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(SHAPE, generator=generator).to(DTYPES[run["dtype"]]) for _ in "xg")
    scale, grid = torch.tensor(0.3), Grid(-8, 7)

    started = time.perf_counter()
    forward, backward = MEANS[run["variant"]]()
    forward(x, scale, grid)
    backward(gradient, x, scale, grid)
    start_up = time.perf_counter() - started
    taken = {
        "forward_ms": [clocked(lambda: forward(x, scale, grid)) for _ in range(rounds)],
        "backward_ms": [clocked(lambda: backward(gradient, x, scale, grid)) for _ in range(rounds)],
    }
    medians = {
        name: round(1000 * statistics.median(one["process_s"] for one in each), 2)
        for name, each in taken.items()
    }
    return {**medians, "start_up_wall_s": round(start_up, 3), "rounds": rounds}


def copy_passes() -> tuple[Forward, Backward]:
    """A copy of the values, and one of the gradient: what memory allows."""
    return lambda x, *_: x.clone(), lambda gradient, *_: gradient.clone()


def numba_passes() -> tuple[Forward, Backward]:
    """The definition as loops that numba compiles, on as many threads as torch has."""
    import numba
    import numpy as np

    numba.set_num_threads(torch.get_num_threads())

    @numba.njit(parallel=True)
    def quantize(x: Any, scale: Any, low: Any, high: Any, y: Any) -> None:
        for at in numba.prange(x.size):
            y[at] = np.rint(min(max(x[at] / scale, low), high)) * scale

    # Sums may be reordered, or the loop would not be vectorized.
    @numba.njit(parallel=True, fastmath={"reassoc", "nsz"})
    def quantize_backward(
        gradient: Any, x: Any, scale: Any, low: Any, high: Any, passed: Any
    ) -> Any:
        total = np.float32(0)
        for at in numba.prange(x.size):
            code = x[at] / scale
            level = np.rint(min(max(code, low), high))
            inside = low <= code <= high
            passed[at] = gradient[at] if inside else np.float32(0)
            total += gradient[at] * (level - (code if inside else np.float32(0)))
        return total

    def numbers(scale: Tensor, grid: Grid) -> tuple[Any, ...]:
        return tuple(np.float32(float(one)) for one in (scale, grid.qmin, grid.qmax))

    def forward(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        y = torch.empty_like(x)
        quantize(x.numpy().ravel(), *numbers(scale, grid), y.numpy().ravel())
        return y

    def backward(gradient: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> Gradients:
        passed = torch.empty_like(x)
        arrays = gradient.numpy().ravel(), x.numpy().ravel()
        total = quantize_backward(*arrays, *numbers(scale, grid), passed.numpy().ravel())
        return passed, torch.tensor(total), torch.zeros(())

    return forward, backward


MEANS: dict[str, Callable[[], tuple[Forward, Backward]]] = {
    "native": lambda: (native.quantized, native.quantized_backward),
    "definition": lambda: (reference.quantized, reference.quantized_backward),
    "torch.compile": lambda: (
        torch.compile(reference.quantized),
        torch.compile(reference.quantized_backward),
    ),
    "numba": numba_passes,
    "copy": copy_passes,
}
"""Means -> what makes its two passes."""
