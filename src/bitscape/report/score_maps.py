"""Maps of scores: how much each layer minds fewer bits of its weights, and of its activations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitscape.policy import LayerBits
from bitscape.report.layer_charts import SHADES, WIDTHS, Cells, cell_map, scale_legend
from bitscape.searches.scores import ScoreTable

DECADES = 6
"""Scores below the largest by more than these have the lowest shade."""


@dataclass(frozen=True)
class Part:
    """Columns of a score table that differ in one width alone."""

    title: str
    varied: str
    """The width that differs, of `WIDTHS`; "" where both do."""
    columns: Sequence[int]


def parts(scores: ScoreTable) -> list[Part]:
    """Return the columns that vary the weights' bits, and those that vary the activations' bits.

    The other width is the largest that was scored. Where neither width varies alone, all columns
    are one part.
    """
    varied_parts = []
    for varied, kept in zip(WIDTHS, reversed(WIDTHS), strict=True):
        most = max(getattr(pair, kept) for pair in scores.candidates)
        columns = [at for at, pair in enumerate(scores.candidates) if getattr(pair, kept) == most]
        columns.sort(key=lambda at: getattr(scores.candidates[at], varied))
        if len(columns) > 1:
            varied_parts.append(Part(f"{varied} bits, with {kept}s at {most} bits", varied, columns))
    every = range(len(scores.candidates))
    return varied_parts or [Part("weight/activation bits", "", every)]


def score_map(title: str, scores: ScoreTable, part: Part, bits: Mapping[str, LayerBits]) -> Markup:
    """Layers across, widths down, the score as a shade on a log scale.

    bits: of the chosen policy; their cells are framed.
    """
    values = drawn_scores(scores)
    low, high = scale_ends([values[row][at] for row in range(len(values)) for at in part.columns])
    shades = [[shade_of(row[at], low, high) for at in part.columns] for row in values]
    labels = [_label(scores.candidates[at], part) for at in part.columns]
    framed = [
        (at, labels.index(label))
        for at, name in enumerate(scores.layers)
        if name in bits and (label := _label(bits[name], part)) in labels
    ]
    cells = Cells(layers=scores.layers, rows=labels, shades=shades, framed=framed)
    legend = scale_legend(
        f"score by {part.varied or 'both'} bits, log scale; lower is better",
        f"≤ {low:.2g}",
        f"{high:.2g}",
        forbidden=any("none" in column for column in shades),
    )
    finite = {
        name: max((row[at] for at in part.columns if math.isfinite(row[at])), default=0.0)
        for name, row in zip(scores.layers, values, strict=True)
    }
    worst = max(finite, key=lambda name: finite[name])
    words = f"Scores from {low:.3g} to {high:.3g}; the largest is of layer {worst}."
    return cell_map(title, words, cells, legend)


def drawn_scores(scores: ScoreTable) -> list[list[float]]:
    """Return the scores, or, where one is below 0, what each is above the layer's best."""
    values: list[list[float]] = scores.values.tolist()
    if any(value < 0 for row in values for value in row):
        values = [[value - min(row) for value in row] for row in values]
    return values


def scale_ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a scale for these scores; at most `DECADES` lie between them."""
    positive = [value for value in values if 0 < value < math.inf]
    high = max(positive, default=1.0)
    return max(min(positive, default=high), high * 10.0**-DECADES), high


def shade_of(value: float, low: float, high: float) -> str:
    """Class of a score: c0 at `low` and below to c11 at `high`, evenly in the logarithm.

    "none" for a forbidden pair.
    """
    if math.isinf(value):
        return "none"
    spans = value > low and high > low
    share = math.log(value / low) / math.log(high / low) if spans else 0.0
    return f"c{min(int(share * SHADES), SHADES - 1)}"


def _label(bits: LayerBits, part: Part) -> str:
    return str(getattr(bits, part.varied)) if part.varied else str(bits)
