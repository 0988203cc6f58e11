"""Quantizing one tensor with a straight-through gradient, and the helpers of learned scales.

`fake_quantize` is the one primitive, with the gradients of LSQ (Esser et al., ICLR 2020, Eq. 3 and 5). `reference.py` defines its
arithmetic; eager mode computes it by the operators of `operators.py`, in one walk through memory each way, and `torch.compile` traces
the definition and fuses it with what is around it. Nothing is saved beside the input.

bfloat16 and float16 values are quantized in float32, whatever autocast says: exported files quantize in float32, and a quotient of 8
significant bits takes another code for one value in fifteen at 8 bits. The result has the type of the values.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.quant import operators, reference
from bitscape.quant.grid import Grid, Number
from bitscape.quant.reference import Arithmetic, widened

MINIMUM_SCALE = 2.0**-100
"""Scales never get smaller, so that a dead channel still has a grid. 2^26 times the smallest normal float32: the reciprocal is finite,
and the products of a scale with gradients and with other scales keep their digits."""

def require_finite(values: Tensor) -> None:
    """Raise BitscapeError for values to which no scale can be fitted."""
    broken = int((~values.isfinite()).sum())
    if broken:
        raise BitscapeError(
            f"{broken} of {values.numel()} values are NaN or infinite: no scale fits them; check the checkpoint and the input normalization"
        )


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within the block, or the function it decorates, products of matrices are computed in the type of their factors."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def power_of_two(magnitude: Tensor) -> Tensor:
    """The largest power of two up to each positive `magnitude`, 1 for zeros: dividing by it rounds nothing.

    Squares of values below 1e-19 are zero in float32; in units of their magnitude they are not.
    """
    mantissa, _ = torch.frexp(magnitude)  # 1/2 <= mantissa < 1
    return torch.where(mantissa == 0, 1.0, magnitude / (2 * mantissa))


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` unchanged, its gradient multiplied by `factor`."""
    scaled = x * factor
    return x.detach() + (scaled - scaled.detach())  # adds an exact zero


def at_least(x: Tensor, minimum: float) -> Tensor:
    """`x`, but not below `minimum`; the gradient passes straight through, so that a learned scale can grow again."""
    x = widened(x)  # a minimum may be 0 in float16
    return x.clamp(min=minimum).detach() + (x - x.detach())  # what is added is exactly 0


def fake_quantize(x: Tensor, scale: Tensor, grid: Grid, *, scale_gradient_factor: float = 1.0) -> Tensor:
    """Quantize and dequantize `x` of any shape.

    Args:
        x: values; gradient 1 inside the grid's range, 0 outside.
        scale: float32 spacing, broadcasts against `x`: 0-d for one scale, (C, 1, ...) for one a channel. Values below
            MINIMUM_SCALE, where training may push it, count as MINIMUM_SCALE and keep their gradient.
        grid: limits and zero point; tensors there broadcast too, so that bits may differ by channel or image. A zero point that requires a
            gradient gets one (LSQ+).
        scale_gradient_factor: multiplies the gradient of `scale`, LSQ's 1 / sqrt(N * qmax).
    """
    if torch.compiler.is_compiling():
        return _traced(x, scale, grid, scale_gradient_factor)
    return _FakeQuantize.apply(x, scale, grid.qmin, grid.qmax, grid.zero_point, scale_gradient_factor)  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function.apply is untyped


def mixed(x: Tensor, scale: Tensor, shares: Tensor, grids: Sequence[Grid], factors: Sequence[float]) -> Tensor:
    """Return sum_i shares_i * fake_quantize(x, scale_i, grid_i).

    Args:
        x: values of any shape.
        scale: (R,) or (R, C, 1, ...), channels at any axis; scale[i] broadcasts against x. Its least is that of `fake_quantize`.
        shares: (R,), summing to 1.
        grids: the R candidates' integer limits, as numbers.
        factors: what each scale's gradient is multiplied by.
    """
    if torch.compiler.is_compiling():
        candidates = zip(shares, scale, grids, factors, strict=True)
        parts = [share * _traced(widened(x), one, grid, factor) for share, one, grid, factor in candidates]
        return torch.stack(parts).sum(0).to(x.dtype)
    return _Mixed.apply(x, scale, shares, tuple(grids), tuple(factors))  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function.apply is untyped


def _traced(x: Tensor, scale: Tensor, grid: Grid, factor: float) -> Tensor:
    """`fake_quantize` for a compiler, which finds the gradients by itself and fuses all of this.

    Of values on the very ends of the range, rounding decides whether their gradient passes: EDGE would cost a pass.
    """
    scale = widened(scale)
    spacing = scale.detach().clamp(min=MINIMUM_SCALE)
    scale = spacing + factor * (scale - scale.detach())  # what is added is exactly 0
    ratio = widened(x) / spacing
    # The derivative by the scale, term by term: that of a quotient holds 1 / scale^2, which is infinite for the smallest scales.
    ratio = ratio - ratio.detach() * ((scale - spacing) / spacing)
    code = torch.clamp(ratio + grid.zero_point, grid.qmin, grid.qmax)  # type: ignore[arg-type]  # both numbers or both tensors
    return ((round_ste(code) - grid.zero_point) * scale).to(x.dtype)


def _twice_differentiable() -> Arithmetic:
    """For a backward pass: the definition where a second one may follow (create_graph), which operators lack."""
    return reference if torch.is_grad_enabled() else operators


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: Number, qmax: Number, zero_point: Number, factor: float) -> Tensor:
        scale = widened(scale).clamp(min=MINIMUM_SCALE)
        ctx.save_for_backward(x, scale, *(one for one in (qmin, qmax, zero_point) if isinstance(one, Tensor)))
        ctx.numbers = tuple(None if isinstance(one, Tensor) else one for one in (qmin, qmax, zero_point))
        ctx.factor = factor
        return operators.quantized(x, scale, Grid(qmin, qmax, zero_point))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *tensors = ctx.saved_tensors
        queue = iter(tensors)
        grid = Grid(*(next(queue) if one is None else one for one in ctx.numbers))
        passed, by_scale, by_zero_point = _twice_differentiable().quantized_backward(gradient, x, scale, grid)
        return passed, by_scale * ctx.factor, None, None, by_zero_point if ctx.needs_input_grad[4] else None, None


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shares: Tensor, grids: tuple[Grid, ...], factors: tuple[float, ...]) -> Tensor:
        scale = widened(scale).clamp(min=MINIMUM_SCALE)
        ctx.save_for_backward(x, scale, shares)
        ctx.grids, ctx.factors = grids, factors
        return operators.mixed(x, scale, shares, grids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shares = ctx.saved_tensors
        passed, by_scale, by_level = _twice_differentiable().mixed_backward(gradient, x, scale, shares, ctx.grids)
        factors = shares * torch.tensor(ctx.factors, dtype=torch.float32, device=scale.device)
        by_shares = (by_level * scale).flatten().reshape(len(shares), -1).sum(1)
        return passed, by_scale * factors.reshape(-1, *[1] * (scale.ndim - 1)), by_shares, None, None
