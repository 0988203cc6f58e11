"""Decoded images kept between runs: decoding 50,000 small images takes about 10 s, reading them back 0.1 s.

The folder is the environment variable BITSCAPE_CACHE, else ~/.cache/bitscape; it may be deleted at any time.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

_log = logging.getLogger("bitscape.data")
LAYOUT = 2  # part of the key: raise it when decoding changes its result
MAX_BYTES = 2_000_000_000  # larger data sets are not kept, so that the disk does not fill unnoticed


def cache_file(files: Iterable[Path], size: int | None, part: str = "") -> Path:
    """Where a `part` of the decoded images in `files` is kept; another time or length of a file is another place."""
    key = hashlib.sha256(f"{LAYOUT}|{size}|{part}".encode())
    for path in files:
        state = path.stat()
        key.update(f"|{path.absolute()}|{state.st_mtime_ns}|{state.st_size}".encode())
    folder = Path(os.environ.get("BITSCAPE_CACHE") or Path.home() / ".cache" / "bitscape")
    return folder / f"{key.hexdigest()[:32]}.npy"


def read_cache(file: Path, count: int) -> npt.NDArray[np.uint8] | None:
    """The `count` kept images as a memory map (n, 3, h, w); None when there are none or the file is damaged."""
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy's reader raises what its tokenizer does, and more
        _log.info("cached images in %s are not usable (%s); decoding again", file, error)
        return None
    usable = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count
    return images if usable else None


def write_cache(file: Path, images: npt.NDArray[np.uint8]) -> None:
    """Keep the images; where that is not possible, nothing is kept and nothing fails."""
    if images.nbytes > MAX_BYTES:
        return
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.save(stream, images, allow_pickle=False)
        temporary.replace(file)
    except OSError as error:
        _log.debug("decoded images are not cached: %s", error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
