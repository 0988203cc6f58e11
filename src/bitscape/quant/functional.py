"""Quantizing one tensor: to integers, back, and both with a straight-through gradient.

`fake_quantize` is the one primitive. In eager mode it is a hand-written autograd function: four in-place passes forward;
backward one masking pass and two dot products, with nothing saved beside the input and the output that the layer keeps anyway.
Under `torch.compile` the plain formula is traced and fused instead. Both have the gradients of LSQ (Esser et al., ICLR 2020, Eq. 3 and 5).

bfloat16 and float16 values are quantized in float32, whatever autocast says: exported files quantize in float32, and a quotient of 8
significant bits takes another code for one value in fifteen at 8 bits. The result has the type of the values.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.quant.grid import Grid, Number

EDGE = 1e-6
"""Relative width by which a bound is moved outwards so that values on it count as inside; a few units in the last place."""
MINIMUM_SCALE = 2.0**-100
"""Scales never get smaller, so that a dead channel still has a grid. 2^26 times the smallest normal float32: the reciprocal is finite,
and the products of a scale with gradients and with other scales keep their digits."""
HALF = (torch.bfloat16, torch.float16)


def widened(x: Tensor) -> Tensor:
    """`x` in float32 if its type has less; otherwise `x` itself."""
    return x.float() if x.dtype in HALF else x


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
    return x.clamp(min=minimum).detach() + (x - x.detach())  # what is added is exactly 0


def quantize(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Codes q in qmin..qmax of `x`, as floats: clip(round(x / scale + zero_point)). `scale` broadcasts against `x`."""
    codes = x / scale
    if _is_shifted(grid.zero_point):
        codes = codes.add_(grid.zero_point)
    codes = codes.round_()
    return clamp_(codes, grid.qmin, grid.qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Number = 0.0) -> Tensor:
    """Real values scale * (q - zero_point) of float `codes`."""
    return (codes - zero_point) * scale if _is_shifted(zero_point) else codes * scale


def fake_quantize(x: Tensor, scale: Tensor, grid: Grid, *, scale_gradient_factor: float = 1.0) -> Tensor:
    """Quantize and dequantize `x` of any shape.

    Args:
        x: values; gradient 1 inside the grid's range, 0 outside.
        scale: positive float32 spacing, broadcasts against `x`: 0-d for one scale, (C, 1, ...) for one a channel.
        grid: limits and zero point; tensors there broadcast too, so that bits may differ by channel or image. A zero point that requires a
            gradient gets one (LSQ+).
        scale_gradient_factor: multiplies the gradient of `scale`, LSQ's 1 / sqrt(N * qmax).
    """
    if torch.compiler.is_compiling():
        return _plain_fake_quantize(x, scale_gradient(scale, scale_gradient_factor), grid)
    return _FakeQuantize.apply(x, scale, grid.qmin, grid.qmax, grid.zero_point, scale_gradient_factor)  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function.apply is untyped


def _plain_fake_quantize(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    spacing = scale.detach()
    ratio = widened(x) / spacing
    # The derivative by the scale, term by term: that of a quotient holds 1 / scale^2, which is infinite for the smallest scales.
    ratio = ratio - ratio.detach() * ((scale - spacing) / spacing)
    q = torch.clamp(ratio + grid.zero_point, grid.qmin, grid.qmax)  # type: ignore[arg-type]  # limits are both numbers or both tensors
    return ((round_ste(q) - grid.zero_point) * scale).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: Number, qmax: Number, zero_point: Number, factor: float) -> Tensor:
        y = _on_grid(widened(x), scale, qmin, qmax, zero_point)
        rounded = x.dtype in HALF  # then y is made again for the gradients: the layer keeps its rounded form alone
        ctx.save_for_backward(x, scale, None if rounded else y, *(v for v in (qmin, qmax, zero_point) if isinstance(v, Tensor)))
        ctx.numbers = tuple(None if isinstance(v, Tensor) else v for v in (qmin, qmax, zero_point))
        ctx.factor = factor
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, y, *tensors = ctx.saved_tensors
        queue = iter(tensors)
        qmin, qmax, zero_point = (next(queue) if v is None else v for v in ctx.numbers)
        kind, x, g = x.dtype, widened(x), widened(g)
        inside = _mask_outside(g, x, scale, qmin, qmax, zero_point)
        g_scale = g_zero_point = None
        if ctx.needs_input_grad[1]:
            # d y / d scale is (y - x) / scale inside and y / scale outside: no need to round again.
            y = _on_grid(x, scale, qmin, qmax, zero_point) if y is None else y
            g_scale = (_sum_product(g, y, scale) - _sum_product(inside, x, scale)) / scale * ctx.factor
        if ctx.needs_input_grad[4]:
            outside = (inside - g).float() * scale
            g_zero_point = outside.sum_to_size(zero_point.shape) if zero_point.ndim else outside.sum()
        return inside.to(kind) if ctx.needs_input_grad[0] else None, g_scale, None, None, g_zero_point, None


def _on_grid(x: Tensor, scale: Tensor, qmin: Number, qmax: Number, zero_point: Number) -> Tensor:
    codes = quantize(x, scale, Grid(qmin, qmax, zero_point))
    if _is_shifted(zero_point):
        codes = codes.sub_(zero_point)
    return codes.mul_(scale)


def _mask_outside(g: Tensor, x: Tensor, scale: Tensor, qmin: Number, qmax: Number, zero_point: Number) -> Tensor:
    """The gradient where `x` lies within the grid's range, else zero."""
    low, high = (qmin - zero_point) * scale, (qmax - zero_point) * scale
    if x.device.type == "cpu" and low.numel() == 1 and high.numel() == 1:
        # One vectorised pass; .item() waits for nothing on a CPU. It is zero at the very bounds, where repaired weights lie, hence wider.
        below, above = low.item(), high.item()
        return torch.ops.aten.hardtanh_backward(g, x, below - EDGE * abs(below), above + EDGE * abs(above))  # type: ignore[no-any-return]  # operators are untyped
    return torch.where((x >= low) & (x <= high), g, 0.0)


def _sum_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of a * b in float32, over the dimensions that `like` shares."""
    if like.numel() > 1:
        return (a.float() * b.float()).sum_to_size(like.shape)
    same_layout = a.stride() == b.stride() and is_dense(a)
    flat_a, flat_b = (storage_order(a), storage_order(b)) if same_layout else (a.reshape(-1), b.reshape(-1))
    return torch.dot(flat_a.float(), flat_b.float()).reshape(like.shape)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block of memory, images outermost: contiguous or channels_last."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def storage_order(x: Tensor) -> Tensor:
    """A dense tensor's elements as they lie in memory, without a copy."""
    return x.as_strided((x.numel(),), (1,))


def clamp_(x: Tensor, low: Number, high: Number) -> Tensor:
    """Limit `x` in place to low .. high, numbers or tensors that broadcast against it."""
    return x.clamp_(low, high)  # type: ignore[arg-type]  # both numbers or both tensors


def _is_shifted(zero_point: Number) -> bool:
    return isinstance(zero_point, Tensor) or zero_point != 0.0
