"""Damaged files, read by the thousand in a process of its own with little memory; every outcome is counted, every bad one kept.

    python -m benchmarks.hardening_fuzz READER SEED FIRST LAST FOLDER     the inner process: one JSON line a file

A file is refused well if a BitscapeError or an OSError names it; anything else than that and a valid load is bad, and so are 5 seconds,
a gigabyte more memory, and the end of the process.
"""

import dataclasses
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from bitscape.errors import BitscapeError

MOST_S, START_S = 5.0, 300.0
"""For one file; for the start of the process, which makes the good files."""
MOST_BYTES = 2**30
REFUSED, LOADED, UNFIT = "refused", "loaded", "refused when used"
GOOD = (REFUSED, LOADED, UNFIT)
SHOWN = 20
"""Bad cases that a record holds."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one damaged file."""

    case: int
    kind: str
    why: str
    seconds: float
    peak_bytes: int
    """Of the process so far."""


def fuzz(reader: str, cases: int, seed: int) -> dict[str, Any]:
    """Read `cases` damaged files. Returns counts, seconds, and the first bad cases."""
    started = time.monotonic()
    outcomes = list(_outcomes(reader, cases, seed))
    bad = [outcome for outcome in outcomes if outcome.kind not in GOOD]
    counts = Counter(outcome.kind for outcome in outcomes)
    return {
        "cases": len(outcomes),
        **{kind.replace(" ", "_"): counts[kind] for kind in GOOD},
        "bad": len(bad),
        "bad_cases": [dataclasses.asdict(outcome) for outcome in bad[:SHOWN]],
        "slowest_s": round(max(outcome.seconds for outcome in outcomes), 4),
        "peak_mib": round(max(outcome.peak_bytes for outcome in outcomes) / 2**20, 1),
        "wall_s": round(time.monotonic() - started, 1),
    }


def _outcomes(reader: str, cases: int, seed: int) -> Iterator[Outcome]:
    """One outcome a case; a process that ends or hangs is one too, and the next goes on behind it."""
    done = 0
    while done < cases:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [reader, str(seed), str(done), str(cases), folder]
            with subprocess.Popen(
                [sys.executable, "-m", "benchmarks.hardening_fuzz", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process:
                ready = False
                for line in _lines(process):
                    if ready:
                        yield Outcome(**json.loads(line))
                        done += 1
                    ready = True
                process.kill()
                if done < cases:
                    assert process.stderr is not None
                    why = f"exit {process.wait()}: {process.stderr.read().decode(errors='replace')[-500:]}"
                    if not ready:
                        raise RuntimeError(f"{reader}: the good files cannot be made or read: {why}")
                    yield Outcome(done, "crash or hang", why, MOST_S, 0)
                    done += 1


def _lines(process: "subprocess.Popen[bytes]") -> Iterator[bytes]:
    """What the process prints, until it ends or is silent for too long."""
    assert process.stdout is not None
    waited, rest = START_S, b""
    while select.select([process.stdout], [], [], waited)[0]:
        chunk = os.read(process.stdout.fileno(), 2**16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        waited = MOST_S if lines else waited
        yield from lines


def worker(name: str, seed: int, first: int, last: int, folder: Path) -> None:
    """Read the damaged files `first` to `last` - 1 and print an outcome for each."""
    import logging

    import torch

    from benchmarks.hardening_readers import READERS

    out = os.fdopen(os.dup(1), "w")  # whatever a library prints must not stand between the lines
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    logging.disable()
    reader = READERS[name]
    reader.make(folder)
    good = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    reader.read(folder)()  # also loads what is imported late
    print("ready", file=out, flush=True)
    _limit_memory()
    for case in range(first, last):
        for path, content in good.items():
            path.write_bytes(content)
        rng = Random(f"{name} {seed} {case}")
        file, damage = rng.choice([(file, kind) for file, kinds in reader.damage.items() for kind in kinds])
        (folder / file).write_bytes(damage(good[folder / file], rng))
        started = time.monotonic()
        kind, why = _outcome(reader, folder, Path(file).name)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(dataclasses.asdict(Outcome(case, kind, why, time.monotonic() - started, peak))), file=out, flush=True)


def _outcome(reader: Any, folder: Path, file: str) -> tuple[str, str]:
    from benchmarks.hardening_data import Wrong

    try:
        use = reader.read(folder)
    except (BitscapeError, OSError) as error:
        message = str(error)
        return (REFUSED, "") if str(folder) in message or file in message else ("unnamed", message[:300])
    except Wrong as error:
        return "wrong", str(error)
    except BaseException as error:
        return "error", _told(error)
    try:
        use()
    except (BitscapeError, OSError):
        return UNFIT, ""
    except Wrong as error:
        return "wrong", str(error)
    except BaseException as error:
        return "error when used", _told(error)
    return LOADED, ""


def _told(error: BaseException) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f" at {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
    return f"{type(error).__name__}: {str(error)[:300]}{where}"


def _limit_memory() -> None:
    """A gigabyte more address space than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
