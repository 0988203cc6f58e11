"""Charts of matplotlib, which is imported when the first one is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitscape.errors import needs_extra

NAMED = 40
"""Layers whose names fit beneath the axis; of more, some are named."""


def new_axes(axes: Any = None) -> Any:
    """Return `axes`, or those of a new figure. Raises BitscapeError without matplotlib."""
    if axes is not None:
        return axes
    with needs_extra("plot"):
        from matplotlib import pyplot
    return pyplot.subplots(figsize=(8, 4), layout="constrained")[1]


def steps(axes: Any, names: Sequence[str], lines: Mapping[str, Sequence[float]]) -> None:
    """Draw lines with one value a name, as steps with a mark for each value."""
    marks = zip(lines.items(), ("o", "x"), strict=False)
    for (label, values), mark in marks:
        axes.plot(range(len(names)), values, drawstyle="steps-mid", marker=mark, linewidth=1, label=label)
    every = -(-len(names) // NAMED)
    axes.set_xticks(range(0, len(names), every), list(names)[::every], rotation=90, fontsize="x-small")
    axes.legend()
