"""Decoded images in a file that is mapped into memory: for data sets that are larger than memory should hold.

What is used stays in memory as long as there is room; the rest is read again. The file is kept in the cache's folder, so that images
are decoded once, by one of all workers and runs that need them, and unreadable ones are found before anything is computed.
"""

import logging
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Int64, UInt8
from torch import Tensor

from bitscape.data.decoding import EncodedImage, decode_images
from bitscape.errors import BitscapeError, first_line

_log = logging.getLogger("bitscape.data")
MEMORY_BYTES = 2_000_000_000  # above, decoded images are mapped


def decode_mapped(
    encoded: Sequence[EncodedImage], shape: tuple[int, ...], file: Path, *, size: int | None, source: str
) -> tuple[UInt8[Tensor, "n 3 h w"], Int64[Tensor, " n"]]:
    """As `decode_images`, with the images, each of `shape`, in `file`; what is there already is not decoded again.

    The images can be read only: writing to them ends the process. Raises BitscapeError as `decode_images` does, and where the file
    cannot be written.
    """
    kept_file = file.with_name(f"{file.stem}.kept.npy")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                _write(encoded, shape, file, kept_file, size=size, source=source)
        images, kept = _read(file, kept_file, (len(encoded), *shape))
    except OSError as error:
        raise BitscapeError(f"{_needed(source, len(encoded), shape)}, which {file.parent} does not take ({error}); {_WAYS_OUT}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(images[: len(kept)]), torch.from_numpy(kept)


_WAYS_OUT = "set BITSCAPE_CACHE to a folder with room, or use a smaller size or fewer images"


def _write(encoded: Sequence[EncodedImage], shape: tuple[int, ...], file: Path, kept_file: Path, *, size: int | None, source: str) -> None:
    needed, free = len(encoded) * math.prod(shape), shutil.disk_usage(file.parent).free
    if needed > free:
        raise BitscapeError(f"{_needed(source, len(encoded), shape)}, and {file.parent} has {free / 1e9:.1f} GB left; {_WAYS_OUT}")
    _log.info("%s of disk, kept as %s", _needed(source, len(encoded), shape), file)
    part = file.with_suffix(".part")  # one name: what a killed run left is written over
    try:
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(encoded), *shape))
        if hasattr(os, "posix_fallocate"):  # a disk that fills while pages are written would end the process
            with part.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, part.stat().st_size)
        _, kept = decode_images(encoded, size=size, source=source, into=pixels)
        pixels.flush()
        np.save(kept_file, kept.numpy())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _read(file: Path, kept_file: Path, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The pixels (n, 3, h, w), mapped, and which images they are."""
    try:
        images, kept = np.load(file, mmap_mode="r", allow_pickle=False), np.load(kept_file, allow_pickle=False)
        whole = (images.shape, images.dtype, kept.ndim, kept.dtype) == (shape, np.uint8, 1, np.int64)
        why = "" if whole and len(kept) <= len(images) and ((kept >= 0) & (kept < len(images))).all() else "of another shape or type"
    except OSError:
        raise
    except Exception as error:  # numpy's reader raises what its tokenizer does, and more
        why = first_line(error)
    if why:
        raise BitscapeError(f"{file}: damaged ({why}); remove it, and the images are decoded again")
    return images, kept


def _needed(source: str, count: int, shape: tuple[int, ...]) -> str:
    return f"{source}: {count:,} decoded images of {shape[1]}x{shape[2]} pixels take {count * math.prod(shape) / 1e9:.1f} GB"
