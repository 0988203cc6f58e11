"""Files that a crash leaves old or new, never half of either; JSON that reads and edits well, read back strictly; checksums."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNSEALED = "0" * 16
"""What stands in the place of a checksum until `sealed` puts it there."""
_SEAL = re.compile(rb'\\"checksum\\": ?\\"([0-9a-f]{16})\\"')
"""In a JSON text within a JSON text: the metadata of safetensors."""


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace the file at `path` by `content` (text as UTF-8); its folder must exist. An OSError names `path`, and the old file stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # of a full disk it names no file, of a folder that is read-only the temporary one
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    """Read a JSON file. Raises ValueError for a damaged one, an entry that stands twice, NaN, infinities, and half characters."""
    try:
        # utf-8-sig: some editors put a byte-order mark in front
        text = content.decode("utf-8-sig")
        document = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        json.dumps(document, ensure_ascii=False).encode()  # fails for one half of a pair such as \ud83d\ude00: no output takes it
        return document
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not readable as JSON ({error}); is the file complete?") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice; keep one of the entries")
    return found


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no allowed number; allowed are finite numbers")
