"""Run records: one JSON object a line, one line a run, appended and never edited.

A benchmark looks first which of its runs the file lacks and does only those, so it can be stopped, continued, and
completed on another machine:

    for wanted in missing(read_runs(path), plan, keys=("network", "method", "budget", "seed")):
        append_run(path, {**wanted, **measure(wanted)})
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bitscape.errors import BitscapeError, nearest
from bitscape.version import __version__

if sys.platform != "win32":
    import fcntl

STAMPED = ("date", "commit", "versions")
"""Fields that `append_run` alone sets."""

FIELDS = (
    *("benchmark", "network", "weights"),
    *("target", "proxy"),  # names, with ":images" for a part; proxy null = the target's own data
    *("method", "variant", "settings", "policy"),  # policy: layer -> [weight bits, activation bits]
    *("budget", "cost"),  # name of the cost -> value
    *("step", "epochs", "seed"),
    *("top1", "float_top1", "test_images"),  # percent
    *("task", "metric", "value", "float_value"),  # of networks that are no classifiers, too
    *("search_s", "train_s", "clock", "peak_bytes"),  # clock: "process" or "wall"
    *("device", "threads", "dtype", "command", "extra"),
    *STAMPED,
)
"""All fields of a run; a run leaves out what does not apply. `settings` and `extra` are free inside."""


def environment() -> dict[str, Any]:
    """Describe the machine and the software: cpu, cores, gpu (None without one), versions. No host names, no paths."""
    import numpy as np
    import torch

    from bitscape.engine import origin

    return {
        "cpu": origin.cpu_model(),
        "cores": origin.cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "bitscape": __version__,
        },
    }


def append_run(path: str | os.PathLike[str], run: Mapping[str, Any]) -> dict[str, Any]:
    """Append one run to the file and return the line as written; the folder is made if need be.

    Adds date (UTC), commit ("unknown" outside a checkout, "-dirty" with changed Python files) and versions, and, where
    the run does not say, device: the GPU if there is one, else the CPU and its cores.

    Raises BitscapeError for an unknown or stamped field, a value that JSON cannot hold (NaN among them), or a file
    whose last line is incomplete.
    """
    from bitscape.engine import origin

    for name, value in run.items():
        _check_field(name)
        if name in STAMPED:
            raise BitscapeError(f"field {name!r} is set when the run is written; leave it out")
        _check_value(name, value)
    here = environment()
    device = {"device": here["gpu"] or f"{here['cpu']}, {here['cores']} cores"}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {**device, **run, "versions": here["versions"], "commit": origin.commit() or "unknown", "date": date}
    _append_line(Path(path), json.dumps(line, allow_nan=False))
    return line


def read_runs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read all runs of a file, none if there is no file yet.

    Raises BitscapeError, naming the file and the line, for a line that is damaged or cut off.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    runs = [_parsed(path, number, line) for number, line in enumerate(lines, start=1)]
    if rest:
        raise _damaged(path, len(lines) + 1, "it was not written to its end")
    return runs


def missing(runs: Iterable[Mapping[str, Any]], wanted: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the `wanted` runs to which no run is equal in all `keys`, in order.

    Args:
        runs: as from `read_runs`.
        wanted: fields that identify a run; a field left out equals null.
        keys: fields compared; "budget.bitops" looks inside a field.

    Raises BitscapeError if a wanted run has a field that the keys do not compare.
    """
    present = {identity(run, keys) for run in runs}
    wanted = list(wanted)
    for name in {name for run in wanted for name in run}:
        if name not in {key.split(".")[0] for key in keys}:
            raise BitscapeError(f"wanted runs have a field {name!r} that is not compared; add it to keys {list(keys)}")
    return [run for run in wanted if identity(run, keys) not in present]


def identity(run: Mapping[str, Any], keys: Sequence[str]) -> tuple[Hashable, ...]:
    """Return the values of `keys` in a run, comparable and hashable; equal numbers are equal however written."""
    return tuple(_hashable(value_of(run, key)) for key in keys)


def value_of(run: Mapping[str, Any], key: str) -> Any:
    """Return a field of a run, "budget.bitops" a part of one, or None where the run lacks it."""
    name, *inner = key.split(".")
    _check_field(name)
    value = run.get(name)
    for part in inner:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check_field(name: str) -> None:
    if name not in FIELDS:
        hint = nearest(name, FIELDS)
        raise BitscapeError(f"a run has no field {name!r}{hint}; free-form values belong in 'settings' or 'extra'")


def _check_value(name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BitscapeError(f"field {name!r} is {value!r}, which JSON cannot hold: {error}") from error


def _hashable(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(inner)) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(inner) for inner in value)
    hashable: Hashable = value
    return hashable


def _append_line(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        _lock(file)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                raise BitscapeError(f"{path}: the last line is incomplete; delete it, its run will be done again")
        file.write(line.encode() + b"\n")
        os.fsync(file.fileno())


def _lock(file: IO[bytes]) -> None:
    """Wait for other processes that append; closing the file unlocks it."""
    # Windows has no flock: there, benchmarks that share a file must take turns.
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        run = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number, str(error)) from error
    if not isinstance(run, dict):
        raise _damaged(path, number, "it is not a JSON object")
    return run


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _damaged(path: Path, number: int, reason: str) -> BitscapeError:
    return BitscapeError(f"{path}, line {number} is damaged: {reason}; delete the line, its run will be done again")
