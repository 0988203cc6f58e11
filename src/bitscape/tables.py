"""Short tables: how policies, results, scores and data print in a terminal and in a notebook."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from bitscape.errors import printable
from bitscape.words import NO_BREAK

FIRST, LAST = 4, 3
"""Rows that are shown of a long table."""
LONGEST = 60
"""Characters of a cell."""
ELLIPSIS = "..."
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, rows of texts under their columns, and a note."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    left: int = 1
    """Columns that are flush left; the others hold numbers."""
    note: str = ""

    def text(self) -> str:
        """The table as lines."""
        lines = [_in_text(self.title)]
        if self.rows:
            cells = [[_in_text(_cut(cell)) for cell in row] for row in (self.columns, *self.rows)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += ["  ".join(self._aligned(row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, _in_text(self.note)] if self.note else lines)

    def html(self) -> str:
        """The table as HTML, every text escaped."""
        parts = [f"<caption>{_safe(self.title)}</caption>"]
        if self.rows:
            parts.append(f"<thead>{self._row(self.columns, 'th')}</thead>")
            parts.append(f"<tbody>{''.join(self._row(row, 'td') for row in self.rows)}</tbody>")
        note = f"<p>{_safe(self.note)}</p>" if self.note else ""
        return f"<table>{''.join(parts)}</table>{note}"

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
        for at, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.ljust(width) if at < self.left else cell.rjust(width)

    def _row(self, row: Sequence[str], tag: str) -> str:
        sides = ["left" if at < self.left else "right" for at in range(len(row))]
        cells = zip(sides, map(_cut, row), strict=True)
        inner = (f'<{tag} style="text-align: {side}">{_safe(cell)}</{tag}>' for side, cell in cells)
        return f"<tr>{''.join(inner)}</tr>"


class Shown(ABC):
    """What prints as a short table."""

    @abstractmethod
    def table(self) -> Table:
        """Return what is printed of it."""

    def __repr__(self) -> str:
        """The table as lines."""
        return self.table().text()

    def _repr_html_(self) -> str:
        """The table as notebooks show it."""
        return self.table().html()


def shortened(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the first and the last rows of many, with a row of ellipses between them."""
    return _ends(rows, [ELLIPSIS] * len(rows[0])) if rows else []


def shortened_row(cells: Sequence[str]) -> list[str]:
    """Return the first and the last cells of many, with an ellipsis between them."""
    return _ends(cells, ELLIPSIS)


def _ends(items: Sequence[Item], between: Item) -> list[Item]:
    return list(items) if len(items) <= FIRST + LAST + 1 else [*items[:FIRST], between, *items[-LAST:]]


def _cut(cell: str) -> str:
    return cell if len(cell) <= LONGEST else f"{cell[: LONGEST // 2]}{ELLIPSIS}{cell[-LONGEST // 3 :]}"


def _in_text(text: str) -> str:
    return printable(text).replace(NO_BREAK, " ")


def _safe(text: str) -> str:
    return escape(printable(text))
