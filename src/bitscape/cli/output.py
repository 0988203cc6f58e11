"""What the commands print: tables on stdout, log lines on stderr, numbers with their units."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast

import click

from bitscape import words
from bitscape.errors import one_line, printable, printable_lines

PIPED_WIDTH = 240  # wide enough that no name is cut in a file or a pipe


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        click.echo(mark + one_line(record.getMessage()), err=True)


class _Printable:
    """A text stream, on which nothing that stands in a file acts on the terminal: see `printable_lines`."""

    buffer = None  # click would write to it

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable_lines(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Within the block, stdout and stderr show escapes for control characters."""
    stdout, stderr = cast(Any, _Printable(sys.stdout)), cast(Any, _Printable(sys.stderr))
    with redirect_stdout(stdout), redirect_stderr(stderr):
        yield


def is_first_worker() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def stdout_of_first_worker() -> Iterator[None]:
    """Print nothing on stdout in the other processes that torchrun started: results are the same everywhere."""
    if is_first_worker():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Print the package's log lines on stderr; progress only of the first worker."""
    log, handler = logging.getLogger("bitscape"), _Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO if is_first_worker() else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table with its first `left` columns flush left and the others flush right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for at, name in enumerate(columns):
        table.add_column(printable(name), justify="left" if at < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def amount(value: float, unit: str = "") -> str:
    """Write a number with 4 digits and a decimal prefix: 34.71 G, 1.2 MB."""
    return words.amount(value, unit).replace(words.NO_BREAK, " ")


def cost_text(kind: str, value: float | None) -> str:
    """Write a cost of a policy in its unit; mean bits are plain numbers, and a dash stands for none."""
    return words.cost_text(kind, value).replace(words.NO_BREAK, " ")


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> its last part, or the whole path where several different ones end alike."""
    last = {path: Path(path).name for path in paths}
    endings = list(last.values())
    return {path: name if endings.count(name) == 1 else path for path, name in last.items()}


def size_ratio(ratio: float, digits: int = 2) -> str:
    """Say how much smaller, or larger, a file is than another one that is `ratio` times its size."""
    smaller, larger = f"{ratio:.{digits}f}", f"{1 / ratio:.{digits}f}"
    return f"{smaller} times smaller" if ratio >= 1 else f"{larger} times larger"


def print_costs(costs: Mapping[str, Mapping[str, float]]) -> None:
    """Print costs side by side: column name -> kind of cost -> value; the first column decides the rows."""
    first = next(iter(costs.values()))
    rows = [[kind, *(cost_text(kind, of[kind]) if kind in of else "" for of in costs.values())] for kind in first]
    print_table(["cost of one image", *costs], rows)
