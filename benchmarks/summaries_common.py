"""What the tables of results share: runs in groups, rows in one order, paired differences with their intervals."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitscape.report.differences import difference
from bitscape.report.records import identity
from bitscape.report.tables import Column, Row, aggregate, render

Run = Mapping[str, Any]
STEPS = ("plain", "sam", "saq")
SEARCHES = ("uniform", "fisher", "differentiable", "seam", "asga", "trained-scores", "local", "kl", "hawq", "topological", "random")
ORDER = ("float", *STEPS, *SEARCHES)
"""Methods as tables list them; others follow."""


def groups(runs: Iterable[Run], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """Runs that agree in `keys`, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(identity(run, keys), []).append(run)
    return found


def rows_of(runs: Iterable[Run], keys: Sequence[str], columns: Sequence[Column]) -> list[Row]:
    """Rows in the order of ORDER, then of first appearance; runs of one network stay together."""
    rows = aggregate(runs, keys, [column.value for column in columns])
    networks = list(dict.fromkeys(row.keys.get("network") for row in rows))
    return sorted(rows, key=lambda row: (networks.index(row.keys.get("network")), _place(row.keys["method"])))


def with_schedule(run: Run, longer: tuple[str, str]) -> Run:
    """The run, with the epochs of the rows that it is compared with among its settings; `longer` names the row of twice as many."""
    epochs = int(run["epochs"]) // 2 if (run["method"], run["variant"]) == longer else int(run["epochs"])
    return {**run, "settings": {**run["settings"], "schedule": epochs}}


def with_column(table: str, heading: str, cells: Sequence[str]) -> str:
    """A rendered table with one more column of text."""
    added = [heading, "---", *cells]
    return "\n".join(f"{line} {cell} |" for line, cell in zip(table.splitlines(), added, strict=True))


def compared(runs: Sequence[Run], names: Mapping[str, str], columns: Sequence[Column], references: Mapping[str, tuple[Any, ...]]) -> str:
    """A table with a row for each value of the keys of `names`; its last columns are paired differences in top-1 to a row each.

    names: key -> heading. references: heading -> the row, by its keys, that the others are compared with.
    """
    rows = rows_of(runs, tuple(names), columns)
    table = render(rows, names, columns)
    top1 = {key: {run["seed"]: run["top1"] for run in group} for key, group in groups(runs, tuple(names)).items()}
    for heading, reference in references.items():
        keys = [identity(row.keys, tuple(names)) for row in rows]
        cells = ["-" if key == reference else paired(top1[key], top1.get(reference, {})) for key in keys]
        table = with_column(table, heading, cells)
    return table


def paired(top1: Mapping[int, float], reference: Mapping[int, float]) -> str:
    """Difference of two rows over the seeds that both have."""
    seeds = sorted(top1.keys() & reference.keys())
    if not seeds:
        return "no seed in common"
    text = difference([top1[seed] - reference[seed] for seed in seeds])
    return text if len(seeds) == len(top1) else f"{text} ({len(seeds)} pairs)"


def _place(method: str) -> int:
    return ORDER.index(method) if method in ORDER else len(ORDER)
