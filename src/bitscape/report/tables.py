"""Tables in documents, made from run records: mean, standard deviation and number of runs for each row."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitscape.errors import BitscapeError, nearest
from bitscape.report.records import identity, value_of

_BEGIN = re.compile(r"\s*<!--\s*table:\s*(.*?)\s*-->\s*")
_END = re.compile(r"\s*<!--\s*end\s*-->\s*")


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one value over runs."""

    mean: float
    """Arithmetic mean."""
    deviation: float | None
    """Sample standard deviation (n - 1); None for a single run."""
    n: int
    """Number of runs that have the value."""


@dataclass(frozen=True)
class Row:
    """Runs that agree in the keys, taken together."""

    keys: Mapping[str, Any]
    """Key -> the value that the runs share."""
    summaries: Mapping[str, Summary | None]
    """Value -> its summary; None if no run has it."""
    n: int
    """Number of runs."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of measured values."""

    value: str
    """Field of the run, for example "top1" or "cost.bitops"."""
    heading: str
    """Text above the column, with the unit."""
    digits: int = 2
    """Digits after the point."""
    scale: float = 1.0
    """Factor before printing: 1e-9 shows bitops as GBitOps."""


def aggregate(runs: Iterable[Mapping[str, Any]], keys: Sequence[str], values: Sequence[str]) -> list[Row]:
    """Summarize `values` over the runs that agree in `keys`, rows in order of first appearance.

    Raises BitscapeError if two runs of a row have the same seed: they then differ in something that the keys leave
    out, or are one run twice, and counting both would make the spread look smaller than it is.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(identity(run, keys), []).append(run)
    return [_row(group, keys, values) for group in groups.values()]


def render(rows: Sequence[Row], keys: Mapping[str, str], columns: Sequence[Column]) -> str:
    """Write rows as a markdown table: the keys (key -> heading), one column a value, and the number of runs n.

    A value reads "mean ± standard deviation", "mean" alone for one run, "-" where no run has it; where fewer than n
    runs have it, "(n=2)" follows.
    """
    headings = [*keys.values(), *(column.heading for column in columns), "n"]
    rules = [*("---" for _ in keys), *("---:" for _ in columns), "---:"]
    cells = [
        [*(_shown(row.keys[key]) for key in keys), *(_measured(row, column) for column in columns), str(row.n)]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rules, *cells])


def update_tables(document: str, tables: Mapping[str, str]) -> str:
    """Replace what stands between "<!-- table: NAME -->" and "<!-- end -->" by the table NAME.

    Each marker stands on a line of its own. Raises BitscapeError, with the line number, for a name that is not among
    `tables`, a table marker that is not closed, and an end that closes nothing.
    """
    written: list[str] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(document.splitlines(keepends=True), start=1):
        begin, end = _BEGIN.fullmatch(line), _END.fullmatch(line)
        if opened and begin:
            raise _unclosed(*opened)
        if end and not opened:
            raise BitscapeError(f"line {number}: an end marker that closes no table; remove it")
        if end or not opened:
            written.append(line)
        if begin:
            opened = (begin[1], number)
            written.append(_named(tables, *opened))
        elif end:
            opened = None
    if opened:
        raise _unclosed(*opened)
    return "".join(written)


def _row(group: list[Mapping[str, Any]], keys: Sequence[str], values: Sequence[str]) -> Row:
    shared = {key: value_of(group[0], key) for key in keys}
    seeds = [run["seed"] for run in group if run.get("seed") is not None]
    if len(set(seeds)) < len(seeds):
        raise BitscapeError(f"runs with {shared} repeat a seed (seeds {seeds}); add a key that tells them apart")
    return Row(shared, {value: _summary(group, value) for value in values}, len(group))


def _summary(group: list[Mapping[str, Any]], value: str) -> Summary | None:
    found = [number for run in group if (number := value_of(run, value)) is not None]
    for number in found:
        if not isinstance(number, (int, float)):
            raise BitscapeError(f"value {value!r} is {number!r} in a run; only numbers can be averaged, make it a key")
    if not found:
        return None
    return Summary(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_shown(inner)}" for name, inner in value.items())
    return str(value).replace("|", r"\|")


def _measured(row: Row, column: Column) -> str:
    summary = row.summaries[column.value]
    if summary is None:
        return "-"
    text = f"{summary.mean * column.scale:.{column.digits}f}"
    if summary.deviation is not None:
        text += f" ± {summary.deviation * column.scale:.{column.digits}f}"
    return text if summary.n == row.n else f"{text} (n={summary.n})"


def _named(tables: Mapping[str, str], name: str, number: int) -> str:
    if name not in tables:
        raise BitscapeError(f"line {number}: there is no table {name!r}{nearest(name, tables)}")
    return tables[name].rstrip("\n") + "\n"


def _unclosed(name: str, number: int) -> BitscapeError:
    return BitscapeError(f'line {number}: table {name!r} is not closed; write "<!-- end -->" after it')
