"""Files that a crash leaves old or new, never half of either; JSON that reads and edits well, read back strictly; checksums."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitscape.errors import first_repeated

MOST_JSON_BYTES = 2**22
"""Of a JSON document: in memory it takes up to 24 times as much. Scores of 5,000 layers for 36 pairs of bits fit."""
MOST_HEADER_BYTES = 2**24
"""Of a safetensors file: a hundred thousand tensors."""
MOST_INTEGER = 2**63 - 1
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
_WRITE_BITS = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
UNSEALED = "0" * 16
"""What stands in the place of a checksum until `sealed` puts it there."""
_SEAL = re.compile(rb'\\"checksum\\": ?\\"([0-9a-f]{16})\\"')
"""In a JSON text within a JSON text: the metadata of safetensors."""


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace the file at `path` by `content` (text as UTF-8); its folder must exist. An OSError names `path`, and the old file stays.

    Of a link, the file that it leads to is replaced. A file keeps its mode and owner. Raises OSError as `check_replaceable`, too.
    """
    check_replaceable(path)
    try:
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with _removed_at_end(temporary):
            with temporary.open("xb") as file:
                _keep_mode_and_owner(target, temporary)
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
    except OSError as error:  # of a full disk it names no file, of a folder that is read-only the temporary one
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise OSError, naming `path`, for what `write_atomic` does not replace: folders, devices, pipes, sockets, read-only files."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise OSError(errno.EINVAL, f"is a {kind}; give the path of a file", os.fspath(path))
    # Root may write everywhere: the mode tells what the owner wants.
    if not mode & _WRITE_BITS or not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "is read-only; make it writable, or give another path", os.fspath(path))


@contextlib.contextmanager
def _removed_at_end(path: Path) -> Iterator[None]:
    """Nothing is at `path` when the block begins and when it ends: a killed process may have left a file, somebody else a link."""
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _keep_mode_and_owner(old: Path, new: Path) -> None:
    """Give the file `new` the mode and, where that is allowed, the owner of `old`, if there is such a file."""
    with contextlib.suppress(FileNotFoundError):
        state = old.stat()
        if hasattr(os, "chown"):
            with contextlib.suppress(PermissionError):
                os.chown(new, state.st_uid, state.st_gid)
        new.chmod(stat.S_IMODE(state.st_mode))


def read_limited(path: str | os.PathLike[str], most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """Return the content of a file. Raises ValueError, without a name, for one of more than `most_bytes`; devices have no end."""
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"has more than {most_bytes:,} bytes; no file of this kind is that large")
    return content


def check_safetensors_header(path: str | os.PathLike[str]) -> None:
    """Raise ValueError, without a name, for a safetensors file whose header is too long to be read: readers build it whole."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"its header claims {length:,} bytes; allowed are {MOST_HEADER_BYTES:,}")


def sealed(content: bytes) -> bytes:
    """Put the checksum of a safetensors file into its metadata, in the place of `UNSEALED`: the SHA-256 of all its other bytes."""
    place = _SEAL.search(content)
    assert place is not None and place[1] == UNSEALED.encode()
    return content[: place.start(1)] + _checksum(content, place) + content[place.end(1) :]


def check_seal(content: bytes) -> None:
    """Raise ValueError unless a file is, to the last bit, what `sealed` returned."""
    place = _SEAL.search(content)
    if place is None:
        raise ValueError("it has no checksum: damaged, or written by another program")
    if place[1] != (found := _checksum(content, place)):
        raise ValueError(f"damaged: its checksum is {place[1].decode()}, that of its bytes {found.decode()}")


def _checksum(content: bytes, place: re.Match[bytes]) -> bytes:
    digest = hashlib.sha256(memoryview(content)[: place.start(1)])
    digest.update(UNSEALED.encode())
    digest.update(memoryview(content)[place.end(1) :])
    return digest.hexdigest()[: len(UNSEALED)].encode()


def json_text(document: Mapping[str, Any]) -> str:
    """Write a JSON object with one entry a line; the entries of a mapping in it stand on a line each too."""
    entries = (
        f"  {json.dumps(name)}: {_block(value) if isinstance(value, Mapping) else json.dumps(value)}" for name, value in document.items()
    )
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _block(mapping: Mapping[str, Any]) -> str:
    if not mapping:
        return "{}"
    lines = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in mapping.items()]
    return "{\n" + ",\n".join(lines) + "\n  }"


def parse_json(content: bytes) -> Any:
    """Read a JSON file.

    Raises ValueError for a damaged one, more than `MOST_JSON_BYTES`, an entry that stands twice, whole numbers beyond 64 bits, NaN,
    infinities, and half characters.
    """
    if len(content) > MOST_JSON_BYTES:
        raise ValueError(f"its JSON has {len(content):,} bytes; allowed are {MOST_JSON_BYTES:,}")
    try:
        # utf-8-sig: some editors put a byte-order mark in front
        text = content.decode("utf-8-sig")
        document = json.loads(text, object_pairs_hook=_without_duplicates, **_STRICT_NUMBERS)
        if _HALF.search(content):
            json.dumps(document, ensure_ascii=False).encode()  # fails for one half of a pair such as \ud83d\ude00: no output takes it
        return document
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not readable as JSON ({error}); is the file complete?") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"{first_repeated(name for name, _ in pairs)!r} stands twice; keep one of the entries")
    return entries


def _integer(text: str) -> int:
    # The length first: to read a number takes time that grows with the square of it.
    if len(text) > len(str(-MOST_INTEGER)) or abs(int(text)) > MOST_INTEGER:
        _refuse_number(text)
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        _refuse_number(text)
    return number


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text} is no allowed number; allowed are finite numbers, whole ones of up to 64 bits")


_STRICT_NUMBERS: Mapping[str, Any] = {"parse_int": _integer, "parse_float": _finite, "parse_constant": _refuse_number}
