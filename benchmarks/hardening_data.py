"""What a reader of damaged files is, and those of data sets: archives, parquet and tar files, folders, what is kept decoded."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.hardening_mutations import damaged_archive, damaged_bytes
from bitscape.data.cache import read_cache, write_cache
from bitscape.data.decoding import EncodedImage
from bitscape.data.mapped import decode_mapped
from bitscape.data.sources import load_dataset

Damage = Callable[[bytes, Random], bytes]
Use = Callable[[], object]
ROWS, CLASSES = 12, 10
"""Images of a data set, and their classes."""


class Wrong(Exception):
    """A damaged file was taken, and what came of it is not what it may be."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How the readers of one kind of file are tried."""

    cases: int
    """Damaged files; fewer where reading takes long."""
    make: Callable[[Path], object]
    """Writes good files into a folder."""
    damage: Mapping[str, tuple[Damage, ...]]
    """File in that folder -> what is done to it."""
    read: Callable[[Path], Use]
    """Reads the folder; errors must name the file. Returns what a user does next, whose errors need not. Raises `Wrong`."""


def need(holds: object, what: str) -> None:
    """Raise `Wrong` unless it holds."""
    if not holds:
        raise Wrong(what)


def _pictures() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (ROWS, 3, 9, 9), dtype=np.uint8)


def _make_npz(folder: Path) -> None:
    names = np.array([f"class {number}" for number in range(CLASSES)])
    np.savez(folder / "data.npz", images=_pictures(), labels=np.arange(ROWS) % CLASSES, class_names=names)
    np.savez_compressed(folder / "small.npz", images=_pictures(), labels=np.arange(ROWS) % CLASSES)


def _encoded(picture: Any, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(file, kind)
    return file.getvalue()


def _make_parquet(folder: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    cells = [{"bytes": _encoded(picture, "PNG"), "path": f"{row}.png"} for row, picture in enumerate(_pictures())]
    table = arrow.table({"image": cells, "label": [row % CLASSES for row in range(ROWS)]})
    parquet.write_table(table, folder / "data.parquet", row_group_size=5)


_KINDS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "ppm": "PPM", "jpeg": "MPO"}


def _make_pictures(folder: Path) -> None:
    (folder / "images").mkdir()
    for at in range(2 * len(_KINDS)):  # of so many, one may be unreadable
        suffix, kind = list(_KINDS.items())[at % len(_KINDS)]
        (folder / "images" / f"{at}.{suffix}").write_bytes(_encoded(_pictures()[at % ROWS], kind))


def _data(name: str, size: int | None = None) -> Callable[[Path], Use]:
    def read(folder: Path) -> Use:
        found = load_dataset(str(folder / name), size=size)
        need(found.images.dtype == torch.uint8 and 0 < len(found) <= 100 * ROWS, "images")
        need(found.labels is None or found.labels.dtype == torch.int64, "labels")
        need(all(type(each) is str for each in found.class_names), "class names")
        return lambda: found.subset(slice(0, 2)).resized(8)

    return read


def _two_archives(folder: Path) -> Use:
    uses = [_data("data.npz")(folder), _data("small.npz")(folder)]
    return lambda: [use() for use in uses]


def _make_tar(folder: Path) -> None:
    with tarfile.open(folder / "data.tar", "w") as tar:
        for row, picture in enumerate(_pictures()):
            label = json.dumps({"label": row % CLASSES, "text": "a picture"}).encode()
            for name, content in ((f"{row:03}.png", _encoded(picture, "PNG")), (f"{row:03}.json", label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _mapped(folder: Path) -> Any:
    encoded = [EncodedImage(f"{row}", _encoded(picture, "PNG")) for row, picture in enumerate(_pictures())]
    return decode_mapped(encoded, (3, 9, 9), folder / "kept.npy", size=None, source=f"{folder}")


def _read_mapped(folder: Path) -> Use:
    images, kept = _mapped(folder)
    need(images.dtype == torch.uint8 and images.shape == (len(kept), 3, 9, 9) and kept.dtype == torch.int64, "images")
    return lambda: int(images.max())


def _make_cache(folder: Path) -> None:
    write_cache(folder / "kept.npy", _pictures())


def _cache(folder: Path) -> Use:
    found = read_cache(folder / "kept.npy", ROWS)
    need(found is None or (found.dtype == np.uint8 and found.ndim == 4 and len(found) == ROWS), "images")
    return lambda: None if found is None else int(found.max(initial=0))


NPZ: tuple[Damage, ...] = (damaged_bytes, damaged_archive)
DATA_READERS: dict[str, Reader] = {
    "npz": Reader(cases=10_000, make=_make_npz, damage={"data.npz": NPZ, "small.npz": NPZ}, read=_two_archives),
    "parquet": Reader(cases=10_000, make=_make_parquet, damage={"data.parquet": (damaged_bytes,)}, read=_data("data.parquet", 8)),
    "folder of images": Reader(
        cases=10_000,
        make=_make_pictures,
        damage={f"images/{at}.{suffix}": (damaged_bytes,) for at, suffix in enumerate(_KINDS)},
        read=_data("images", 8),
    ),
    "tar": Reader(cases=10_000, make=_make_tar, damage={"data.tar": (damaged_bytes,)}, read=_data("data.tar", 8)),
    "mapped images": Reader(
        cases=10_000, make=_mapped, damage=dict.fromkeys(("kept.npy", "kept.kept.npy"), (damaged_bytes,)), read=_read_mapped
    ),
    "cached images": Reader(cases=10_000, make=_make_cache, damage={"kept.npy": (damaged_bytes,)}, read=_cache),
}

# Decoded images of damaged files are not worth keeping: below a file nothing is kept.
os.environ["BITSCAPE_CACHE"] = f"{os.devnull}/cache"
