"""Files that a crash leaves old or new, never half of either; JSON that reads and edits well, read back strictly."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace the file at `path` by `content` (text as UTF-8); its folder must exist."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Read a JSON file. Raises ValueError for a damaged one, for an entry that stands twice, for NaN and infinities."""
    try:
        # utf-8-sig: some editors put a byte-order mark in front
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
