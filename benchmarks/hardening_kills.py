"""Processes killed (SIGKILL) at random moments and in the middle of writing, then run again: does the end come out the same?"""

import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.hardening_jobs import JOBS, Files, Job, environment, make_inputs, run, temporary_files

JOBS_KILLED = ("search", "train", "export packed", "export onnx")
OLD = b"an old file"
MOST_TRIES = 5
"""Starts for one kill: a process that ends before its moment comes is no kill."""


@dataclass
class Kills:
    """What became of the killed runs."""

    kills: int = 0
    while_writing: int = 0
    """Of these, with a temporary file half written."""
    with_results: int = 0
    """Of these, with some of its files new already."""
    bad: int = 0
    """Files that were neither old nor new after the kill, runs that failed when started again or ended otherwise."""
    bad_cases: list[str] = field(default_factory=list)
    left_files: int = 0
    """Temporary files that the second run left where they were; none of them is ever read."""

    def complain(self, what: str) -> None:
        """Note a bad case."""
        self.bad += 1
        self.bad_cases.append(what)


def kill_often(name: str, times: int, seed: int) -> dict[str, Any]:
    """Kill the job `times` times, every second time while it writes a file, and run it again each time."""
    job, rng, found, started = JOBS[name], Random(f"{name} {seed}"), Kills(), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        whole = _folder(Path(place), "whole")
        begun = time.monotonic()
        done = run(job.command(inputs, whole))
        seconds, expected = time.monotonic() - begun, job.found(whole)
        if done.returncode or set(expected) != set(job.artefacts):
            raise RuntimeError(f"{name} fails without a kill: {done.stderr}")
        for at in range(times):
            folder = _killed(job, inputs, _folder(Path(place), str(at)), seconds, rng, writing=at % 2 == 1)
            if folder is not None:
                _again(job, inputs, folder, expected, found)
    return {**vars(found), "whole_s": round(seconds, 1), "wall_s": round(time.monotonic() - started, 1)}


def _folder(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


def _killed(job: Job, inputs: Path, folder: Path, seconds: float, rng: Random, *, writing: bool) -> Path | None:
    """Start the job on top of old files and kill it; None if it was always done before."""
    for attempt in range(MOST_TRIES):
        own = _folder(folder, str(attempt))
        for name in job.artefacts:
            if "/" not in name:
                (own / name).write_bytes(OLD)
        with subprocess.Popen(job.command(inputs, own), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            if writing:
                _wait_for_writing(process, own, 0 if attempt else rng.randrange(4))  # some jobs write a single file
            else:
                _wait(process, rng.uniform(0.1, 1.0) * seconds)
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                return own
    return None


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _wait_for_writing(process: "subprocess.Popen[bytes]", folder: Path, skipped: int) -> None:
    """Return at the sight of a temporary file, after so many others; folders that a job makes are looked into as well."""
    seen: set[Path] = set()
    while process.poll() is None:
        for path in temporary_files(folder):
            if path not in seen:
                seen.add(path)
                if len(seen) > skipped:
                    return
        seen &= set(temporary_files(folder))
        time.sleep(0.0005)


def _again(job: Job, inputs: Path, folder: Path, expected: Files, found: Kills) -> None:
    found.kills += 1
    found.while_writing += bool(temporary_files(folder))
    left = job.found(folder)
    found.with_results += any(content == expected[name] for name, content in left.items())
    for name, content in left.items():
        if "/" not in name and content not in (OLD, expected[name]):
            found.complain(f"{name} is neither old nor new after a kill")
    done = run(job.command(inputs, folder))
    ended = job.found(folder)
    if done.returncode:
        found.complain(f"run again, exit {done.returncode}: {done.stderr[-300:]}")
    elif ended != expected:
        found.complain(f"run again, other bytes in {', '.join(_differing(ended, expected))}")
    found.left_files += len(temporary_files(folder))


def _differing(ended: Files, expected: Files) -> Sequence[str]:
    return [name for name in expected if ended.get(name) != expected[name]]
