"""Triton programs of fake-quantization and mixtures of widths, for `gpu.py`.

Every element is computed by the operations of reference.py in their order, in float32, so that
values and their gradients have the same bits; `gpu.py` forbids fused multiply-adds.

A program works on a tile: COUNT elements of each of WIDTH channels. A channel has `each` elements,
in rows of `inner` (see rows.py). What a tile sums up has a place of its own, so that the order of
additions never changes. Positions are of 32 bits. Values in Triton's language have no Python types.
"""

from typing import no_type_check

import triton
import triton.language as tl

EDGE = tl.constexpr(1e-6)
WHOLE = tl.constexpr(2.0**23)
"""float32 values from here to twice this are whole numbers."""


@triton.jit
@no_type_check
def _tile(channels, inner, each, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Channels of the program's tile, positions of its elements, and which of them exist."""
    block = tl.program_id(0) % tl.cdiv(each, COUNT)
    channel = tl.program_id(0) // tl.cdiv(each, COUNT) * WIDTH + tl.arange(0, WIDTH)[:, None]
    element = block * COUNT + tl.arange(0, COUNT)[None, :]
    position = channel * inner + element + element // inner * ((channels - 1) * inner)
    return channel, position, (channel < channels) & (element < each)


@triton.jit
@no_type_check
def _number(given, channel, exists):
    """A number, or that of each channel where there is a pointer to them."""
    place = given + channel
    if place.dtype.is_ptr():
        return tl.load(place, exists, other=1.0)
    else:
        return given


@triton.jit
@no_type_check
def _grid(scale, qmin, qmax, zero_point, channel, exists):
    """The numbers of each channel's grid."""
    return (
        _number(scale, channel, exists),
        _number(qmin, channel, exists),
        _number(qmax, channel, exists),
        _number(zero_point, channel, exists),
    )


@triton.jit
@no_type_check
def _level(ratio, qmin, qmax, zero_point):
    """The level of x / scale, in scales. NaN stays NaN: comparisons with it are false."""
    code = ratio + zero_point
    code = tl.where(code < qmin, qmin, code)
    code = tl.where(code > qmax, qmax, code)
    whole = (tl.abs(code) + WHOLE) - WHOLE  # rounds half to even: codes are of at most 16 bits
    return tl.where(code < 0.0, -1.0 * whole, whole) - zero_point  # -whole is 0 - whole, never -0


@triton.jit
@no_type_check
def _inside(x, scale, qmin, qmax, zero_point):
    """Whether gradients pass."""
    low = (qmin - zero_point) * scale
    high = (qmax - zero_point) * scale
    return (x >= low - EDGE * tl.abs(low)) & (x <= high + EDGE * tl.abs(high))


@triton.jit
@no_type_check
def _store_sums(sums, values, column, channels, each, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Add up each channel's `values` of the tile; `sums`: float32 (columns, channels, tiles)."""
    tiles = tl.cdiv(each, COUNT)
    channel = tl.program_id(0) // tiles * WIDTH + tl.arange(0, WIDTH)
    place = (column * channels + channel) * tiles + tl.program_id(0) % tiles
    tl.store(sums + place, tl.sum(values, 1), channel < channels)


@triton.jit
@no_type_check
def quantize(
    x, y, scale, qmin, qmax, zero_point, channels, inner, each,
    WIDTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """`scale`, limits and zero point: numbers, or pointers to one of each channel, float32."""
    channel, position, exists = _tile(channels, inner, each, WIDTH, COUNT)
    known = channel < channels
    scale, qmin, qmax, zero_point = _grid(scale, qmin, qmax, zero_point, channel, known)
    value = tl.load(x + position, exists, other=0.0).to(tl.float32)
    level = _level(tl.div_rn(value, scale), qmin, qmax, zero_point)
    tl.store(y + position, level * scale, exists)


@triton.jit
@no_type_check
def quantize_backward(
    x, gradient, passed, scale, qmin, qmax, zero_point, sums, channels, inner, each,
    WIDTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """As `quantize`. Sums: the gradient of the scale, and `gradient` outside the range."""
    channel, position, exists = _tile(channels, inner, each, WIDTH, COUNT)
    known = channel < channels
    scale, qmin, qmax, zero_point = _grid(scale, qmin, qmax, zero_point, channel, known)
    value = tl.load(x + position, exists, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + position, exists, other=0.0).to(tl.float32)
    ratio = tl.div_rn(value, scale)
    inside = _inside(value, scale, qmin, qmax, zero_point)
    slope = _level(ratio, qmin, qmax, zero_point) - tl.where(inside, ratio, 0.0)
    tl.store(passed + position, tl.where(inside, upstream, 0.0), exists)
    _store_sums(sums, upstream * slope, 0, channels, each, WIDTH, COUNT)
    _store_sums(sums, tl.where(inside, 0.0, upstream), 1, channels, each, WIDTH, COUNT)


@triton.jit
@no_type_check
def mix(
    x, y, scale, shares, qmin, qmax, zero_point, channels, inner, each,
    WIDTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """`scale`: float32 (candidates, channels); limits and zero points: numbers, one a candidate."""
    channel, position, exists = _tile(channels, inner, each, WIDTH, COUNT)
    value = tl.load(x + position, exists, other=0.0).to(tl.float32)
    total = tl.zeros_like(value)
    for at in tl.static_range(len(qmin)):
        step = _number(scale + at * channels, channel, channel < channels)
        level = _level(tl.div_rn(value, step), qmin[at], qmax[at], zero_point[at])
        part = level * (step * tl.load(shares + at))
        if at == 0:
            total = part
        else:
            total += part
    tl.store(y + position, total, exists)


@triton.jit
@no_type_check
def mix_backward(
    x, gradient, passed, scale, shares, qmin, qmax, zero_point, sums, channels, inner, each,
    WIDTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """As `mix`. Sums, by candidate: the gradient of its scale, without its share, and `gradient`
    times its level."""
    channel, position, exists = _tile(channels, inner, each, WIDTH, COUNT)
    value = tl.load(x + position, exists, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + position, exists, other=0.0).to(tl.float32)
    total = tl.zeros_like(upstream)
    for at in tl.static_range(len(qmin)):
        step = _number(scale + at * channels, channel, channel < channels)
        ratio = tl.div_rn(value, step)
        level = _level(ratio, qmin[at], qmax[at], zero_point[at])
        inside = _inside(value, step, qmin[at], qmax[at], zero_point[at])
        part = tl.where(inside, upstream, 0.0) * tl.load(shares + at)
        if at == 0:
            total = part
        else:
            total += part
        by_scale = upstream * (level - tl.where(inside, ratio, 0.0))
        _store_sums(sums, by_scale, 2 * at, channels, each, WIDTH, COUNT)
        _store_sums(sums, upstream * level, 2 * at + 1, channels, each, WIDTH, COUNT)
    tl.store(passed + position, total, exists)
