"""The bits of each layer over depth: the area of a disc is what the layer costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitscape.policy import LayerBits
from bitscape.report.layer_charts import (
    LEFT,
    RIGHT,
    WIDTHS,
    axis_lines,
    bit_ticks,
    column_step,
    name_labels,
    names_height,
    top_bits,
)
from bitscape.report.svg import Scale, dot, line, path, picture, rect, text

BIT, TITLE, ROOM, GAP = 13, 30, 16, 18
"""Pixels: height of a bit, of a panel's title, of the room for discs above it, between panels."""
LARGEST, SMALLEST, PLAIN = 17.0, 2.0, 4.5
"""Pixels: radius of the costliest layer, of the cheapest, and of all where costs are not known."""


@dataclass(frozen=True, kw_only=True)
class DepthLayer:
    """One layer of the figure."""

    name: str
    bits: LayerBits
    least: LayerBits
    """Bits that images may go down to; `bits` of a static layer."""
    uniform: LayerBits | None
    """Bits of the uniform policy beside it."""
    series: int
    """Color of its kind."""
    costs: tuple[tuple[float, str], tuple[float, str]] | None
    """What its weights, and its computation, cost, each as a number and in words."""


def depth_chart(title: str, layers: Sequence[DepthLayer]) -> Markup:
    """Two panels in call order: weight bits and weight bytes, activation bits and BitOps."""
    step = column_step(len(layers))
    width, body, y = LEFT + step * len(layers) + RIGHT, [], 0.0
    both = [layer.bits for layer in layers] + [layer.uniform for layer in layers if layer.uniform]
    top = top_bits(both)
    priced = all(layer.costs for layer in layers)
    for at, (kind, area) in enumerate(zip(WIDTHS, ("weight bytes", "BitOps"), strict=True)):
        words = f"{kind} bits; area of a disc: {area}" if priced else f"{kind} bits"
        body.append(text(LEFT, y + 16, words, "head"))
        start = y + TITLE + ROOM
        scale = Scale(low=0, high=top, start=start + top * BIT, end=start)
        body += _panel(layers, at, scale, step, width)
        y = start + top * BIT + GAP
    names = [layer.name for layer in layers]
    body += name_labels(names, step, y - GAP + 8)
    ranges = ", ".join(
        _range(kind, [getattr(layer.bits, kind) for layer in layers]) for kind in WIDTHS
    )
    words = f"{len(layers)} layers in call order: {ranges}."
    return picture(title, words, width, y - GAP + 8 + names_height(names), body)


def _panel(layers: Sequence[DepthLayer], at: int, y: Scale, step: float, width: float) -> list[str]:
    """One of the two widths of every layer."""
    kind = WIDTHS[at]
    most = max((layer.costs[at][0] for layer in layers if layer.costs), default=0.0)
    parts = [*axis_lines(y, bit_ticks(y.high), width)]
    marks, labels, corners = [], [], []
    for column, layer in enumerate(layers):
        x = LEFT + (column + 0.5) * step
        bits, least = getattr(layer.bits, kind), getattr(layer.least, kind)
        height = y(min(bits, y.high))
        radius = _radius(layer.costs[at][0], most) if layer.costs else PLAIN
        words = str(bits) if least == bits else f"{least}-{bits}"
        cost = f", {layer.costs[at][1]}" if layer.costs else ""
        css = f"s{layer.series}"
        marks.append(line(x, y(0), x, y(min(least, y.high)), f"{css} stem"))
        if least < bits:
            marks.append(rect(x - 3, height, 6, y(least) - height, f"{css} light"))
        marks.append(
            dot(x, height, radius, f"{css} disc", f"{layer.name}: {words} {kind} bits{cost}")
        )
        size = "tiny" if len(words) > 2 else "small"
        labels.append(text(x, height - radius - 3, words, f"{size} lifted", anchor="middle"))
        if layer.uniform:
            level = y(min(getattr(layer.uniform, kind), y.high))
            corners += [(x - step / 2, level), (x + step / 2, level)]
    if corners:
        parts.append(path(corners, "uniform curve", "uniform bits"))
    return [*parts, *marks, *labels, line(LEFT, y(0), width - RIGHT, y(0), "axis")]


def _radius(cost: float, most: float) -> float:
    return max(LARGEST * math.sqrt(cost / most), SMALLEST) if most else SMALLEST


def _range(kind: str, widths: Sequence[int]) -> str:
    return f"{kind} bits from {min(widths)} to {max(widths)}"
