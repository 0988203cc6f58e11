"""What a section of a report is made of; the template writes each kind of block."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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


Block = Text | Table | Figure | Commands


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
