"""Folders that training and searching write: names of their files, the lock, files that belong together, and temporary folders."""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from bitscape.errors import BitscapeError
from bitscape.files import write_atomic

CHECKPOINT, METRICS, RUN = "checkpoint.safetensors", "metrics.jsonl", "run.json"
POLICY_FILE, WEIGHTS_FILE = "policy.json", "model.safetensors"
DYNAMIC_FILE, TIERS_FILE, GATE_FILE = "dynamic.json", "tiers.json", "gate.safetensors"
SEARCH_FILE = "search.json"
RESULTS = (CHECKPOINT, WEIGHTS_FILE, POLICY_FILE, DYNAMIC_FILE, TIERS_FILE, GATE_FILE, SEARCH_FILE)
"""Files whose loss would cost somebody work."""
_WRITTEN = frozenset({*RESULTS, METRICS, RUN, "search", "head"})
_TIER = re.compile(r"tier\d+")
_LOCK, _OWNER = ".lock", ".lock-owner"
_FULL_BYTES = 2**20
"""A disk with less room is full."""


def is_written(name: str) -> bool:
    """Whether a command may write a file or folder of this name into its output folder."""
    return name in _WRITTEN or _TIER.fullmatch(name) is not None


def results_in(folder: Path) -> list[str]:
    """Names of the files of an earlier run that `folder` holds; none if there is no such folder."""
    return [name for name in RESULTS if (folder / name).exists()]


@contextmanager
def locked(folder: Path, file: str = "") -> Iterator[None]:
    """Keep other processes and threads from writing to a folder within the block; it may be nested.

    The system frees the lock of a process that ends, however it ends.

    Args:
        folder: made if it is missing.
        file: name of the one file in it that is locked instead.

    Raises:
        BitscapeError: another process, which the message names, holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f".{file}" if file else ""
    lock = _lock(str(folder.resolve() / f"{prefix}{_LOCK}"), os.getpid())
    owner = folder / f"{prefix}{_OWNER}"
    outermost = not lock.is_locked
    try:
        lock.acquire(timeout=0)
    except Timeout:
        kind = "file" if file else "folder"
        raise BitscapeError(
            f"{folder / file}: {_name(owner)} is writing to this {kind}; "
            f"wait until it ends, or give another {kind}"
        ) from None
    try:
        if outermost:
            write_atomic(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if outermost:
            owner.unlink(missing_ok=True)
        lock.release()


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together, the last of which leads to the others.

    The old one of that name is removed first: a crash may leave it missing, but never beside files of another writing.
    """
    *_, last = files
    last.unlink(missing_ok=True)
    for path, content in files.items():
        write_atomic(path, content)


@cache
def _lock(path: str, process: int) -> FileLock:
    """One object for each file, so that a thread that holds the lock may take it again; another one after a fork."""
    return FileLock(path)


def _name(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for the block. Raises BitscapeError, naming TMPDIR, for whatever fails while its disk is full."""
    with TemporaryDirectory(prefix="bitscape-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            yield folder
        except Exception as error:  # libraries tell of a full disk in many ways, or name the wrong file
            if not _is_full(folder, error):
                raise
            raise BitscapeError(f"{folder.parent}: no space left for temporary files; set TMPDIR to a folder with room") from error


def _is_full(folder: Path, error: Exception) -> bool:
    if isinstance(error, OSError) and error.filename is not None and not Path(os.fspath(error.filename)).is_relative_to(folder):
        return False  # another disk
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(folder).free < _FULL_BYTES


@contextmanager
def replaced_if_good(*paths: Path) -> Iterator[Path]:
    """Give a draft of the first of the files, elsewhere; if nothing fails within the block, the files are replaced by the drafts."""
    with scratch_folder() as folder:
        yield folder / paths[0].name
        write_together({path: (folder / path.name).read_bytes() for path in reversed(paths)})
