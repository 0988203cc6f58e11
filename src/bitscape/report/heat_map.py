"""Heat maps as SVG: accuracy, and bits, of a network under each corruption at each severity."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from bitscape.data.corruptions import CLEAN, HELD_OUT, TRAINED
from bitscape.engine.quality_table import Cell, QualityTable
from bitscape.errors import BitscapeError

Color = tuple[int, int, int]
Values = Mapping[str, Sequence[float | None]]

BLUES: Sequence[Color] = ((255, 250, 214), (74, 178, 190), (10, 31, 92))
REDS: Sequence[Color] = ((255, 244, 222), (236, 132, 78), (98, 10, 40))
"""From low to high; lightness falls all the way, so that no hue needs to be told apart."""
BLACK, WHITE, GRAY = (0, 0, 0), (255, 255, 255), (236, 236, 236)

WIDE, HIGH, LABELS, GAP, HEADING = 54, 24, 128, 22, 44
"""Pixels: a cell, the names left of the cells, what a new group of rows takes, what stands above the first row."""
BANDS = 27
"""Colors of the scale below a panel; ten pixels each."""


def heat_map(table: QualityTable) -> str:
    """An SVG of top-1 and, where the network reports them, of mean bits: corruptions down, severities across.

    Clean images are the first row, one cell; then come the corruptions of TRAINED, those of HELD_OUT, and the others.
    """
    width, height, body = quality_panels(table, y=48)
    return _page(heading(table), max(width, 520), height, body)


def heading(table: QualityTable) -> str:
    """What the heat map says in a line."""
    return f"Top-1 {table.clean.top1:.2f} % clean, {table.mean():.2f} % in the mean of all corruptions"


def quality_panels(table: QualityTable, *, y: float) -> tuple[float, float, list[str]]:
    """Width and height that the panels of a table take from the top of a picture, and the panels, whose upper edge is at `y`."""
    groups = _groups(table)
    panels = [("top-1, %", BLUES, 1, _values(table, lambda cell: cell.top1))]
    if any(cell.bits is not None for cell in table.cells):
        panels.append(("mean activation bits", REDS, 2, _values(table, lambda cell: cell.bits)))
    columns = list(map(str, table.severities))
    across = LABELS + len(columns) * WIDE + 40
    body = [
        panel(values, x=16 + at * across, y=y, title=title, axis="severity", columns=columns, ramp=ramp, digits=digits, groups=groups)
        for at, (title, ramp, digits, values) in enumerate(panels)
    ]
    height = HEADING + (1 + len(table.corruptions)) * HIGH + len(groups) * GAP + 46
    return 16 + len(panels) * across - 24, y + height + 12, body


def panel(
    values: Values,
    *,
    x: float,
    y: float,
    title: str,
    axis: str,
    columns: Sequence[str],
    ramp: Sequence[Color],
    digits: int,
    groups: Mapping[str, str] | None = None,
) -> str:
    """One heat map with its scale below, as an SVG group whose corner is (x, y).

    Args:
        values: row -> a value for each column, None where there is none; a single value is one cell as wide as all columns.
        axis: what the columns are.
        ramp: colors of the lowest to the highest value.
        digits: after the point.
        groups: row -> what is written above it, where a group of rows begins.

    Raises:
        BitscapeError: no finite value, or a row that fits neither form.
    """
    groups = groups or {}
    low, high = _span(values, columns)
    left, top = x + LABELS, y + HEADING
    width = len(columns) * WIDE
    parts = ['<g class="panel">', _text(left, y + 12, title, size=13, bold=True)]
    parts += [_text(x + LABELS - 8, top - 8, axis, anchor="end")]
    parts += [_text(left + (at + 0.5) * WIDE, top - 8, name, anchor="middle") for at, name in enumerate(columns)]
    for row, numbers in values.items():
        if row in groups:
            parts.append(_text(left, top + GAP - 6, groups[row]))
            top += GAP
        parts.append(_text(left - 8, top + 16, row, anchor="end"))
        wide = width / len(numbers)
        for at, number in enumerate(numbers):
            color = GRAY if number is None else shade(ramp, _share(number, low, high))
            words = "-" if number is None else f"{number:.{digits}f}"
            parts += _cell(left + at * wide, top, wide, color, words)
        top += HIGH
    parts += [*_scale(left, top + 16, width, ramp, (low, high), digits), "</g>"]
    return "\n".join(parts)


def _values(table: QualityTable, value: Callable[[Cell], float | None]) -> dict[str, list[float | None]]:
    found = {(cell.corruption, cell.severity): value(cell) for cell in table.cells}
    rows: dict[str, list[float | None]] = {CLEAN: [value(table.clean)]}
    return rows | {_shown(name): [found.get((name, severity)) for severity in table.severities] for name in _ordered(table)}


def _ordered(table: QualityTable) -> list[str]:
    return sorted(table.corruptions, key=_group)  # stable: within a group they stay as they are


def _groups(table: QualityTable) -> dict[str, str]:
    """The first row of each group -> what the group is called."""
    titles = ("in the training mix", "held out", "others")
    first = {_group(name): _shown(name) for name in reversed(_ordered(table))}
    return {row: titles[group] for group, row in first.items()}


def _group(name: str) -> int:
    return 0 if name in TRAINED else 1 if name in HELD_OUT else 2


def _shown(name: str) -> str:
    return name.replace("_", " ")


def _span(values: Values, columns: Sequence[str]) -> tuple[float, float]:
    for row, numbers in values.items():
        if len(numbers) not in (1, len(columns)):
            raise BitscapeError(f"values: row {row!r} has {len(numbers)} values; allowed are {len(columns)}, one a column, or a single one")
    drawn = [number for numbers in values.values() for number in numbers if number is not None]
    if not drawn or not all(map(math.isfinite, drawn)):
        raise BitscapeError(f"values: rows {list(values)} hold no number, or one that is not finite; give finite numbers or None")
    return min(drawn), max(drawn)


def _share(number: float, low: float, high: float) -> float:
    return (number - low) / (high - low) if high > low else 0.5


def _cell(x: float, y: float, wide: float, color: Color, words: str) -> list[str]:
    ink = max((BLACK, WHITE), key=lambda ink: _contrast(ink, color))
    fill = f'<rect class="cell" x="{x:g}" y="{y:g}" width="{wide - 1:g}" height="{HIGH - 1}" fill="{web_color(color)}"/>'
    return [fill, _text(x + (wide - 1) / 2, y + 16, words, anchor="middle", ink=web_color(ink))]


def _scale(x: float, y: float, width: float, ramp: Sequence[Color], span: tuple[float, float], digits: int) -> list[str]:
    step = width / BANDS
    parts = [
        f'<rect x="{x + at * step:g}" y="{y:g}" width="{step:g}" height="10" fill="{web_color(shade(ramp, at / (BANDS - 1)))}" '
        'shape-rendering="crispEdges"/>'
        for at in range(BANDS)
    ]
    low, high = span
    ends = ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    return parts + [
        _text(x + share * width, y + 24, f"{low + share * (high - low):.{digits}f}", anchor=anchor, size=10) for share, anchor in ends
    ]


def shade(ramp: Sequence[Color], share: float) -> Color:
    """The color at a share, 0 to 1, of a ramp."""
    place = share * (len(ramp) - 1)
    at = min(int(place), len(ramp) - 2)
    red, green, blue = (round(one + (two - one) * (place - at)) for one, two in zip(ramp[at], ramp[at + 1], strict=True))
    return red, green, blue


def _contrast(one: Color, other: Color) -> float:
    """Contrast ratio, 1 to 21, of WCAG 2.1, which asks 4.5 of text; black or white has that on every color."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: Color) -> float:
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in (value / 255 for value in color)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def web_color(color: Color) -> str:
    """The color as SVG and CSS write it."""
    return "#" + "".join(f"{value:02x}" for value in color)


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11, bold: bool = False, ink: str = "currentColor") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{ink}"{weight}>{escape(words)}</text>'


def _page(label: str, width: float, height: float, body: Sequence[str]) -> str:
    inner = "\n".join([_text(16, 24, label, size=12), *body])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}" color="#000000" font-family="system-ui, sans-serif">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{inner}\n</svg>\n'
    )
