"""One file that holds everything a run needs to go on: safetensors, with the plain data as JSON in its header.

Nothing is pickled. The file appears whole or not at all: it is written beside its place, flushed to disk, renamed. A checksum tells
whether a bit of it has changed since.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitscape.errors import BitscapeError, first_line, nearest
from bitscape.files import UNSEALED, check_safetensors_header, check_seal, sealed, write_atomic

FORMAT = 1
_AGAIN = "or start over in another folder"
TOLD = 5
"""Differences that a message names; the others are counted."""


class CheckpointError(BitscapeError):
    """A checkpoint that cannot be continued from."""


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON data `header` to `path`, atomically."""
    # Clones: safetensors refuses tensors that share memory, and tied weights do.
    plain = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, "checksum": UNSEALED, **header})
    write_atomic(path, sealed(save(plain, metadata={"bitscape": text})))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU) and the header of a checkpoint.

    Raises CheckpointError for a truncated or damaged file, another program's file and another format version.
    """
    try:
        check_safetensors_header(path)
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - not a mapping
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read, it is truncated or damaged ({error}); restore it from a copy, {_AGAIN}"
        ) from error


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get("bitscape")
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file but no training checkpoint; pass another folder")
    check_seal(path.read_bytes())
    header = json.loads(text)  # not parse_json: a loss may be infinite
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("checksum", None)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {header.get('format')}, this version reads {FORMAT}; "
            f"continue with the version that wrote it, {_AGAIN}"
        )
    return header


def check_same_tensors(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError, naming the difference, unless both have the same names and shapes."""
    missing, unknown = [name for name in own if name not in saved], [name for name in saved if name not in own]
    reshaped = [name for name in own if name in saved and saved[name].shape != own[name].shape]
    problems = [  # of each kind as many as are told: to look for the nearest name takes long
        *(f"{name} is missing from the checkpoint{nearest(name, saved)}" for name in missing[:TOLD]),
        *(f"{name} is not in the {what}{nearest(name, own)}" for name in unknown[:TOLD]),
        *(f"{name} has shape {tuple(saved[name].shape)}, the {what} {tuple(own[name].shape)}" for name in reshaped[:TOLD]),
    ]
    if problems:
        told = _first(problems, len(missing) + len(unknown) + len(reshaped))
        raise CheckpointError(f"checkpoint {path} belongs to another {what}: {told}; pass the one it was made with, {_AGAIN}")


def check_same_settings(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming each field that differs, unless both are equal."""
    if changed := changes(saved, own):
        raise CheckpointError(f"checkpoint {path} was made with other settings: {changed}; pass those settings, {_AGAIN}")


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Within the block, what a checkpoint lacks, and what torch does not take of it, is a CheckpointError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"checkpoint {path} does not hold what a run needs ({type(error).__name__}: {first_line(error)}); "
            f"restore it from a copy, {_AGAIN}"
        ) from error


def changes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say which fields of two nested mappings differ, the first five of them, and how; "" if none does."""
    before, now = dict(_leaves("", saved)), dict(_leaves("", own))
    return _first(
        [
            f"{name} was {before.get(name, 'absent')!r} and is {now.get(name, 'absent')!r}"
            for name in dict.fromkeys((*before, *now))
            if before.get(name, "absent") != now.get(name, "absent")
        ]
    )


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{prefix}.{key}" if prefix else str(key), inner)]


def _first(problems: list[str], count: int | None = None) -> str:
    """The first of `count` problems, of which at least those are in the list; None: it has all."""
    more = (len(problems) if count is None else count) - TOLD
    return "; ".join(problems[:TOLD]) + (f" (and {more} more)" if more > 0 else "")
