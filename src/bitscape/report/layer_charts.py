"""Charts with a column for each layer, in the same place in all of them: bars, and a map of scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitscape.policy import LayerBits
from bitscape.report.svg import Scale, line, picture, rect, text
from bitscape.searches.scores import ScoreTable

LEFT, RIGHT = 44, 12
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
DECADES = 6
"""Scores below the largest by more than these have the lowest shade."""


@dataclass(frozen=True)
class Bar:
    """One layer in a panel of bars."""

    value: float
    words: str
    """Above the bar."""
    tip: str
    """Under the pointer."""
    solid: float | None = None
    """Up to here the bar is solid, above it is light: a width that images decide. None: all of it."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One panel: a bar for each layer."""

    title: str
    css: str
    top: float
    """Value of a bar as high as the panel."""
    ticks: Sequence[float]
    unit: str = ""
    """After each tick."""
    bars: Sequence[Bar]


def bar_panels(title: str, description: str, names: Sequence[str], panels: Sequence[Bars]) -> Markup:
    """Panels of bars above one another; the layers' names stand below the last."""
    step = _step(len(names))
    width, body, y = LEFT + step * len(names) + RIGHT, [], 0.0
    for panel in panels:
        body += _panel(panel, y + TITLE, step, width)
        y += TITLE + BAR_HEIGHT + GAP
    bottom = y - GAP + 8
    body += _names(names, step, bottom)
    return picture(title, description, width, bottom + _room(names), body)


def bits_panels(title: str, bits: Mapping[str, LayerBits], least: Mapping[str, LayerBits] | None = None) -> Markup:
    """Weight and activation bits of each layer; `least`: layer -> bits that images may go down to."""
    least = least or {}
    panels = []
    for kind in ("weight", "activation"):
        bars = [_bits_bar(name, kind, getattr(own, kind), getattr(least.get(name, own), kind)) for name, own in bits.items()]
        panels.append(Bars(title=f"{kind} bits", css=f"{kind}s", top=8, ticks=(2, 4, 6, 8), bars=bars))
    widths = {kind: sorted({getattr(own, kind) for own in bits.values()}) for kind in ("weight", "activation")}
    ranges = ", ".join(f"{kind} bits from {found[0]} to {found[-1]}" for kind, found in widths.items())
    return bar_panels(title, f"{len(bits)} layers in call order: {ranges}.", list(bits), panels)


def share_panels(title: str, shares: Mapping[str, Mapping[str, tuple[float, str]]]) -> Markup:
    """Kind of cost -> layer -> its share in percent and its cost in words."""
    panels = []
    names = list(next(iter(shares.values())))
    largest = []
    for css, (kind, own) in zip(("work", "storage"), shares.items(), strict=True):
        top = max(share for share, _ in own.values()) or 1.0
        bars = [
            Bar(share, f"{share:.0f}" if share >= 1 else "", f"{name}: {share:.2f} % of {kind}, {words}")
            for name, (share, words) in own.items()
        ]
        ticks = Scale(low=0, high=top, start=0, end=1).ticks(4)
        panels.append(Bars(title=f"% of {kind}", css=css, top=top, ticks=ticks, bars=bars))
        largest.append(f"{max(own, key=lambda name: own[name][0])} has the largest share of {kind}, {top:.1f} %")
    return bar_panels(title, "; ".join(largest) + ".", names, panels)


def score_map(title: str, scores: ScoreTable, chosen: Mapping[str, LayerBits]) -> Markup:
    """Layers across, pairs of bits down, the score as a shade on a log scale; the chosen pairs are framed."""
    step = _step(len(scores.layers))
    values, low, high = drawn_scores(scores)
    top = 52.0
    shaded: dict[str, list[str]] = {}
    for at, row in enumerate(values):
        for down, value in enumerate(row):
            shaded.setdefault(shade_of(value, low, high), []).append(_box(at, down, step, top))
    framed = [
        _box(at, scores.candidates.index(chosen[name]), step, top)
        for at, name in enumerate(scores.layers)
        if chosen.get(name) in scores.candidates
    ]
    body = [f'<path class="{css}" d="{"".join(boxes)}"/>' for css, boxes in sorted(shaded.items())]
    body += [f'<path class="{css}" d="{"".join(framed)}"/>' for css in ("halo", "frame") if framed]
    body += [text(LEFT - 6, top + (at + 0.8) * CELL, str(bits), "small", anchor="end") for at, bits in enumerate(scores.candidates)]
    bottom = top + len(scores.candidates) * CELL + 10
    body += [*_legend(low, high, "none" in shaded), *_names(scores.layers, step, bottom)]
    worst = max(range(len(values)), key=lambda at: max(value for value in values[at] if math.isfinite(value)))
    words = f"Scores from {low:.3g} to {high:.3g}; the largest is of layer {scores.layers[worst]}."
    return picture(title, words, max(LEFT + step * len(scores.layers) + RIGHT, 420), bottom + _room(scores.layers), body)


def drawn_scores(scores: ScoreTable) -> tuple[list[list[float]], float, float]:
    """What the map shows, and the ends of its scale: scores, or, where one is below 0, what each is above the layer's best."""
    values = scores.values.tolist()
    if any(value < 0 for row in values for value in row):
        values = [[value - min(row) for value in row] for row in values]
    positive = [value for row in values for value in row if 0 < value < math.inf]
    high = max(positive, default=1.0)
    return values, max(min(positive, default=high), high * 10.0**-DECADES), high


def shade_of(value: float, low: float, high: float) -> str:
    """Class of a score: c0 at `low` and below to c11 at `high`, evenly in the logarithm; "none" for a forbidden pair."""
    if math.isinf(value):
        return "none"
    share = math.log(value / low) / math.log(high / low) if value > low and high > low else 0.0
    return f"c{min(int(share * SHADES), SHADES - 1)}"


def _bits_bar(name: str, kind: str, most: int, least: int) -> Bar:
    words = str(most) if least == most else f"{least}-{most}"
    return Bar(most, words, f"{name}: {words} {kind} bits", None if least == most else least)


def _step(columns: int) -> float:
    return min(max(WIDTH / columns, NARROWEST), WIDEST)


def _panel(panel: Bars, top: float, step: float, width: float) -> list[str]:
    y = Scale(low=0, high=panel.top, start=top + BAR_HEIGHT, end=top)
    parts = [text(LEFT, top - 22, panel.title, "head")]
    for tick in panel.ticks:
        parts += [line(LEFT, y(tick), width - RIGHT, y(tick), "grid"), text(LEFT - 6, y(tick) + 4, f"{tick:g}", "small", anchor="end")]
    for at, bar in enumerate(panel.bars):
        x = LEFT + at * step + 2
        solid = bar.value if bar.solid is None else bar.solid
        if solid < bar.value:
            parts.append(rect(x, y(bar.value), step - 4, y(solid) - y(bar.value), f"{panel.css} light", bar.tip))
        parts.append(rect(x, y(solid), step - 4, y(0) - y(solid), panel.css, bar.tip))
        parts.append(text(x + step / 2 - 2, y(bar.value) - 3, bar.words, "tiny" if len(bar.words) > 2 else "small", anchor="middle"))
    return [*parts, line(LEFT, y(0), width - RIGHT, y(0), "axis")]


def _names(names: Sequence[str], step: float, y: float) -> list[str]:
    return [text(LEFT + (at + 0.5) * step + 4, y, _short(name), "small", anchor="end", turn=-90) for at, name in enumerate(names)]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _room(names: Sequence[str]) -> float:
    return max(len(_short(name)) for name in names) * LETTER + 8


def _box(at: int, down: int, step: float, top: float) -> str:
    """Part of a path: the cell of a layer and a pair."""
    return f"M{LEFT + at * step:.5g} {top + down * CELL:g}h{step - 1:.4g}v{CELL - 1}h{1 - step:.4g}z"


def _legend(low: float, high: float, forbidden: bool) -> list[str]:
    parts = [text(LEFT, 14, "score, log scale; lower is better", "small")]
    parts += [rect(LEFT + 22 * at, 22, 22, 10, f"c{at}") for at in range(SHADES)]
    end = LEFT + 22 * SHADES
    parts += [text(LEFT, 44, f"≤ {low:.2g}", "small"), text(end, 44, f"{high:.2g}", "small", anchor="end")]
    if forbidden:
        parts += [rect(end + 20, 22, 22, 10, "none"), text(end + 48, 31, "forbidden", "small")]
    return parts
