"""Charts with a column for each layer, in the same place in all of them: bars, bits, maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitscape.policy import LayerBits
from bitscape.report.svg import Scale, group, line, picture, rect, text

LEFT, RIGHT = 54, 12
WIDTH, NARROWEST, WIDEST = 940, 17, 56
"""Pixels: what all columns take together if they may, and the limits of one column."""
BAR_HEIGHT, TITLE, GAP = 88, 38, 10
CELL = 13
LETTER = 6.3
"""Pixels: width of a letter of a layer's name."""
LONGEST = 34
"""Letters of a name; of a longer one the end is shown."""
SHADES = 12
"""Classes c0 to c11, from low to high."""
MOST_BITS = 8
"""Height of a panel of bits, unless some layer has more."""
WIDTHS = ("weight", "activation")
"""Of a layer."""


@dataclass(frozen=True)
class Bar:
    """One layer in a panel of bars."""

    value: float
    words: str
    """Above the bar."""
    tip: str
    """Under the pointer."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One panel: a bar for each layer."""

    title: str
    css: str
    top: float
    """Value of a bar as high as the panel."""
    ticks: Sequence[float]
    bars: Sequence[Bar]


def bar_panels(
    title: str, description: str, names: Sequence[str], panels: Sequence[Bars]
) -> Markup:
    """Panels of bars above one another; the layers' names stand below the last."""
    step = column_step(len(names))
    width, body, y = LEFT + step * len(names) + RIGHT, [], 0.0
    for panel in panels:
        body += _panel(panel, y + TITLE, step, width)
        y += TITLE + BAR_HEIGHT + GAP
    bottom = y - GAP + 8
    body += name_labels(names, step, bottom)
    return picture(title, description, width, bottom + names_height(names), body)


def bits_panels(
    title: str, bits: Mapping[str, LayerBits], kinds: Sequence[str], top: float
) -> Markup:
    """Bits of each layer, a panel for each of `kinds`; `top`: bits of a bar as high as a panel."""
    panels = []
    for kind in kinds:
        widths = {name: getattr(own, kind) for name, own in bits.items()}
        bars = [
            Bar(min(width, top), str(width), f"{name}, {kind} bits")
            for name, width in widths.items()
        ]
        ticks = bit_ticks(top)
        panels.append(Bars(title=f"{kind} bits", css=f"{kind}s", top=top, ticks=ticks, bars=bars))
    return bar_panels(title, f"{len(bits)} layers in call order.", list(bits), panels)


def top_bits(bits: Sequence[LayerBits]) -> int:
    """Return the height in bits of a panel for these layers; float ones reach its top."""
    return max((MOST_BITS, *(max(own.weight, own.activation) for own in bits if not own.is_float)))


def bit_ticks(top: float) -> list[float]:
    """Return the labeled bits of a panel."""
    step = 2 if top <= MOST_BITS else 4
    return [float(bits) for bits in range(step, int(top) + 1, step)]


def share_panels(title: str, shares: Mapping[str, Mapping[str, tuple[float, str]]]) -> Markup:
    """Kind of cost -> layer -> its share in percent and its cost in words."""
    panels = []
    names = list(next(iter(shares.values())))
    largest = []
    for css, (kind, own) in zip(("work", "storage"), shares.items(), strict=True):
        top = max(share for share, _ in own.values()) or 1.0
        bars = [
            Bar(
                share,
                f"{share:.0f}" if share >= 1 else "",
                f"{name}: {share:.2f} % of {kind}, {words}",
            )
            for name, (share, words) in own.items()
        ]
        ticks = Scale(low=0, high=top, start=0, end=1).ticks(4)
        panels.append(Bars(title=f"% of {kind}", css=css, top=top, ticks=ticks, bars=bars))
        name = max(own, key=lambda name: own[name][0])
        largest.append(f"{name} has the largest share of {kind}, {top:.1f} %")
    return bar_panels(title, "; ".join(largest) + ".", names, panels)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A map: layers across, rows down, a shade in each cell."""

    layers: Sequence[str]
    rows: Sequence[str]
    """Labels, from top to bottom."""
    shades: Sequence[Sequence[str]]
    """Layer by layer, the class of each row's cell."""
    framed: Sequence[tuple[int, int]] = ()
    """Layer and row of the cells that are framed."""
    marked: int | None = None
    """Row that is framed as a whole, which a script may move."""


def cell_map(
    title: str, description: str, cells: Cells, legend: Sequence[str], *, label: str = "small"
) -> Markup:
    """The cells under a legend 52 pixels high, above the layers' names.

    label: class of the rows' labels.
    """
    step, top = column_step(len(cells.layers)), LEGEND_HEIGHT
    boxes: dict[str, list[str]] = {}
    for at, column in enumerate(cells.shades):
        for down, css in enumerate(column):
            boxes.setdefault(css, []).append(_box(at, down, step, top))
    body = [f'<path class="{css}" d="{"".join(own)}"/>' for css, own in sorted(boxes.items())]
    framed = "".join(_box(at, down, step, top) for at, down in cells.framed)
    body += [f'<path class="{css}" d="{framed}"/>' for css in ("halo", "frame") if framed]
    if cells.marked is not None:
        y, across = top + cells.marked * CELL - 0.5, step * len(cells.layers)
        frame = [rect(LEFT - 0.5, y, across, CELL, css) for css in ("halo", "frame")]
        body.append(group(frame, {"first": top - 0.5, "step": CELL}))
    for at, words in enumerate(cells.rows):
        body.append(text(LEFT - 6, top + (at + 0.8) * CELL, words, label, anchor="end"))
    bottom = top + len(cells.rows) * CELL + 10
    body += [*legend, *name_labels(cells.layers, step, bottom)]
    width = max(LEFT + step * len(cells.layers) + RIGHT, 420)
    return picture(title, description, width, bottom + names_height(cells.layers), body)


LEGEND_HEIGHT = 52.0
"""Pixels above the cells of a map."""


def scale_legend(words: str, low: str, high: str, *, forbidden: bool = False) -> list[str]:
    """All shades in a row, with what the first and the last one mean."""
    parts = [text(LEFT, 14, words, "small")]
    parts += [rect(LEFT + 22 * at, 22, 22, 10, f"c{at}") for at in range(SHADES)]
    end = LEFT + 22 * SHADES
    parts += [text(LEFT, 44, low, "small"), text(end, 44, high, "small", anchor="end")]
    if forbidden:
        parts += [rect(end + 20, 22, 22, 10, "none"), text(end + 48, 31, "forbidden", "small")]
    return parts


def column_step(columns: int) -> float:
    """Return the pixels from one layer to the next."""
    return min(max(WIDTH / columns, NARROWEST), WIDEST)


def name_labels(names: Sequence[str], step: float, y: float) -> list[str]:
    """The layers' names, upright, below `y`."""
    return [
        text(LEFT + (at + 0.5) * step + 4, y, _short(name), "small", anchor="end", turn=-90)
        for at, name in enumerate(names)
    ]


def names_height(names: Sequence[str]) -> float:
    """Return the pixels that the names take."""
    return max(len(_short(name)) for name in names) * LETTER + 8


def axis_lines(y: Scale, ticks: Sequence[float], width: float) -> list[str]:
    """Grid lines across all columns, and the labels of their values."""
    parts = []
    for tick in ticks:
        parts.append(line(LEFT, y(tick), width - RIGHT, y(tick), "grid"))
        parts.append(text(LEFT - 6, y(tick) + 4, f"{tick:g}", "small", anchor="end"))
    return parts


def _panel(panel: Bars, top: float, step: float, width: float) -> list[str]:
    y = Scale(low=0, high=panel.top, start=top + BAR_HEIGHT, end=top)
    bars = []
    for at, bar in enumerate(panel.bars):
        x = LEFT + at * step + 2
        css = "tiny" if len(bar.words) > 2 else "small"
        bars.append(rect(x, y(bar.value), step - 4, y(0) - y(bar.value), panel.css, bar.tip))
        bars.append(text(x + step / 2 - 2, y(bar.value) - 3, bar.words, css, anchor="middle"))
    unit = BAR_HEIGHT / panel.top
    about = {"panel": panel.css, "base": y(0), "unit": unit, "top": panel.top}
    return [
        text(LEFT, top - 22, panel.title, "head"),
        *axis_lines(y, panel.ticks, width),
        group(bars, about),
        line(LEFT, y(0), width - RIGHT, y(0), "axis"),
    ]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _box(at: int, down: int, step: float, top: float) -> str:
    """Part of a path: the cell of a layer and a row."""
    x, y = LEFT + at * step, top + down * CELL
    return f"M{x:.5g} {y:g}h{step - 1:.4g}v{CELL - 1}h{1 - step:.4g}z"
