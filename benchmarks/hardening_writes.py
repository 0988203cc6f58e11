"""Writing onto disks that are full or read-only: one line that names the file, exit code 2, and the old file as it was.

A full disk is a small tmpfs, a read-only one is a tmpfs mounted again; where mounting is not allowed, these are left out. A limit on the
size of files (RLIMIT_FSIZE) works everywhere.
"""

import contextlib
import dataclasses
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.hardening_jobs import DATA, JOBS, MODEL, Job, make_inputs, run, temporary_files

Condition = Literal["size limit", "full disk", "read-only disk"]
CONDITIONS: tuple[Condition, ...] = ("size limit", "full disk", "read-only disk")
DISK_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Write:
    """A job, and the file whose writing fails."""

    job: Job
    fails: str
    """Below the job's folder."""
    room: int
    """Bytes that still fit when the job is run again: enough for the files that are written before."""
    read_only_fails: str | None = None
    """The first file that is written."""


def _fisher(option: str, name: str) -> Job:
    def arguments(inputs: Path, folder: Path) -> Sequence[object]:
        network = (*MODEL, "--weights", inputs / "model.safetensors", *DATA)
        return ("search", *network, "--images", 32, "--budget", "bitops=w4a4", option, folder / name)

    return Job(arguments=arguments, artefacts=(name,))


_TRAIN, _FOLDER = JOBS["train"], "run/run.json"
WRITES: dict[str, Write] = {
    "policy": Write(job=_fisher("--out", "policy.json"), fails="policy.json", room=512),
    "scores": Write(job=_fisher("--scores", "scores.json"), fails="scores.json", room=2048),
    "packed": Write(job=JOBS["export packed"], fails="packed.safetensors", room=8192),
    "onnx": Write(job=JOBS["export onnx"], fails="network.onnx", room=8192),
    "qonnx": Write(job=JOBS["export qonnx"], fails="network.qonnx.onnx", room=8192),
    "run.json": Write(job=_TRAIN, fails=_FOLDER, room=1024),
    "metrics": Write(job=_TRAIN, fails="run/metrics.jsonl", room=4096, read_only_fails=_FOLDER),
    "weights": Write(job=_TRAIN, fails="run/model.safetensors", room=65_536, read_only_fails=_FOLDER),
    "checkpoint": Write(
        job=dataclasses.replace(_TRAIN, resumable="", arguments=lambda i, f: _float_run(f / "new")),
        fails="new/checkpoint.safetensors",
        room=65_536,
        read_only_fails="new",
    ),
    "folder of a search": Write(job=JOBS["search"], fails="kept/search/run.json", room=1024),
}


def _float_run(folder: Path) -> Sequence[object]:
    return ("train", *MODEL, *DATA, "--epochs", 1, "--out", folder)


def write_badly(artefact: str, condition: Condition) -> dict[str, Any] | None:
    """Write an artefact over its old self under the condition; None where this system does not allow to make it."""
    write = WRITES[artefact]
    with tempfile.TemporaryDirectory() as place, _disk(Path(place) / "disk", condition) as folder:
        if folder is None:
            return None
        inputs = Path(place) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        before = _old(write, inputs, folder)
        with _worse(folder, condition, write.room):
            limit = (lambda: _limit(write.room)) if condition == "size limit" else None
            done = run(write.job.command(inputs, folder), preexec_fn=limit)
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        fails = write.read_only_fails if condition == "read-only disk" and write.read_only_fails else write.fails
        complaints = _complaints(done, Path(fails).name)
        old = {path: content for path, content in before.items() if path.name == Path(fails).name}
        complaints += [f"{path.name} changed" for path, content in old.items() if after.get(path) != content]
        complaints += [f"{path.name} is left" for path in temporary_files(folder)]
        last = (done.stderr.strip().splitlines() or [""])[-1].replace(str(folder), "...").replace(place, "...")
        last = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "...", last)  # drafts
        return {"exit": done.returncode, "message": last, "bad": len(complaints), "bad_cases": complaints}


def _old(write: Write, inputs: Path, folder: Path) -> dict[Path, bytes]:
    """The files of a run that went well."""
    if write.fails.startswith("new"):
        return {}
    done = run(write.job.command(inputs, folder))
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _complaints(done: "subprocess.CompletedProcess[str]", name: str) -> list[str]:
    lines = done.stderr.strip().splitlines() or [""]
    found = [] if done.returncode == 2 else [f"exit {done.returncode}"]
    found += [] if lines[-1].startswith("error: ") and name in lines[-1] else [f"no line that names {name}: {lines[-1][:200]}"]
    return found + (["a traceback"] if "Traceback" in done.stderr else [])


def _limit(room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@contextlib.contextmanager
def _disk(folder: Path, condition: Condition) -> Iterator[Path | None]:
    """A folder; on a disk of its own where the condition needs one, None where none can be mounted."""
    folder.mkdir()
    if condition == "size limit":
        yield folder
        return
    if not sys.platform.startswith("linux") or _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def _worse(folder: Path, condition: Condition, room: int) -> Iterator[None]:
    if condition == "full disk":
        _fill(folder / "filler", room)
    if condition == "read-only disk":
        _mount("-o", "remount,ro", str(folder))
    yield
    if condition == "read-only disk":
        _mount("-o", "remount,rw", str(folder))


def _fill(path: Path, room: int) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, max(0, path.stat().st_size - room))


def _mount(*arguments: str) -> int:
    """Exit code of `mount`; not 0 where it is not allowed or not there."""
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode
    except OSError:
        return 1
