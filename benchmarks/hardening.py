"""hardening: damaged files by the thousand, processes killed while they work, disks that are full or read-only.

    python -m benchmarks.hardening [--only fuzz] [--reader packed] [--cases 1000]

Fuzz: for every reader of a file that users pass around, good files are damaged (bits, bytes, lengths, JSON entries, tensors) and read in
a process with little memory. Allowed are an error that names the file, and a file that is read and holds what it may hold. Hostile:
files that are made to take memory or time, with a limit on both. Kill: SIGKILL at random moments and in the middle of writing, then the
same command again; its files must be those of a run that was left alone, to the last byte. Write: artefacts are written over their old
selves onto a disk that does not take them. A run with a bad case is an error, and no row.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.common import RESULTS, record
from benchmarks.hardening_fuzz import fuzz
from benchmarks.hardening_hostile import HOSTILE, read_hostile
from benchmarks.hardening_kills import JOBS_KILLED, kill_often
from benchmarks.hardening_readers import READERS
from benchmarks.hardening_writes import CONDITIONS, WRITES, write_badly
from bitscape.report.records import missing, read_runs

NAME = "hardening"
KEYS = ("network", "method", "variant", "settings", "seed")
METHODS = ("fuzz", "hostile", "write", "kill")
KILLS = 10


def wanted(
    methods: tuple[str, ...] = METHODS, readers: tuple[str, ...] = tuple(READERS), cases: int | None = None
) -> Iterator[dict[str, Any]]:
    """Every run of the benchmark, with `cases` damaged files of each kind, or as many as its reader says."""
    common = {"network": "digits_net", "seed": 0}
    if "fuzz" in methods:
        yield from ({**common, "method": "fuzz", "variant": name, "settings": {"cases": cases or READERS[name].cases}} for name in readers)
    if "hostile" in methods:
        yield from ({**common, "method": "hostile", "variant": name, "settings": {"files": len(HOSTILE[name])}} for name in readers)
    if "write" in methods:
        for artefact in WRITES:
            for condition in CONDITIONS:
                yield {**common, "method": "write", "variant": artefact, "settings": {"condition": condition}}
    if "kill" in methods:
        yield from ({**common, "method": "kill", "variant": job, "settings": {"kills": KILLS}} for job in JOBS_KILLED)


def measure(run: dict[str, Any]) -> dict[str, Any] | None:
    """What came of one run; None where the system does not allow it."""
    name, seed, settings = run["variant"], run["seed"], run["settings"]
    if run["method"] == "fuzz":
        return fuzz(name, settings["cases"], seed)
    if run["method"] == "hostile":
        return read_hostile(name)
    if run["method"] == "kill":
        return kill_often(name, settings["kills"], seed)
    return write_badly(name, settings["condition"])


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=METHODS)
    parser.add_argument("--reader", action="append", choices=list(READERS))
    parser.add_argument("--cases", type=int, help="damaged files of each kind; default: 10,000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = wanted(tuple(options.only or METHODS), tuple(options.reader or READERS), options.cases)
    bad = 0
    for run in missing(read_runs(RESULTS / f"{NAME}.jsonl"), runs, KEYS):
        extra = measure(dict(run))
        if extra is None:
            print(f"{run['variant']}, {run['settings']}: cannot be made on this system", flush=True)
        elif extra["bad"]:
            bad += extra["bad"]
            print(f"BAD {run['variant']}, {run['settings']}: {extra}", flush=True)
        else:
            record(NAME, {**run, "clock": "wall", "extra": {name: value for name, value in extra.items() if name != "bad_cases"}})
    if bad:
        raise SystemExit(f"{bad} bad cases; their runs were not recorded")


if __name__ == "__main__":
    main()
