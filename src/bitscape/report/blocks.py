"""What a section of a report is made of; the template writes each kind of block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str
    is_verdict: bool = False
    """Whether it answers the section's question."""
    kind: str = field(default="text", init=False)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell is the heading of its row."""
    left: int = 1
    """Columns of words; the others are numbers."""
    is_folded: bool = False
    """Whether it opens on demand: the numbers behind a figure."""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One or several pictures with one caption."""

    caption: str
    pictures: Sequence[Markup]
    legend: Sequence[tuple[str, str]] = ()
    """Classes of a sample -> what it stands for."""
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]
    kind: str = field(default="commands", init=False)


@dataclass(frozen=True, kw_only=True)
class Slider:
    """Pictures of many policies; a script shows the one that a slider points at."""

    caption: str
    chart: Markup
    """All policies by cost and score."""
    bits: Markup
    """Bars of one policy, that of `start`."""
    maps: Sequence[Markup]
    """The bits of every policy."""
    legend: Sequence[tuple[str, str]]
    """Of the chart, as of a `Figure`."""
    start: int
    """Where the slider stands first."""
    data: Mapping[str, Any]
    """What templates/slider.js reads; "told" has each policy in words."""
    kind: str = field(default="slider", init=False)


Block = Text | Table | Figure | Commands | Slider


@dataclass(frozen=True, kw_only=True)
class Change:
    """A number before and after quantization."""

    name: str
    before: str
    """"" where it is not known."""
    after: str
    note: str
    """Interval, factor, what it is beside; "" for none."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The first screen."""

    words: str
    """What the report is about, in a few sentences; "" where nothing tells."""
    changes: Sequence[Change]
    figure: Figure | None


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A section without data."""

    title: str
    reason: str
    """What it lacks, and what would bring it."""
