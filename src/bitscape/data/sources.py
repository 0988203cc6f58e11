"""Every data set in one shape: uint8 images, integer labels, class names.

The embedded digits are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine
Learning Repository, 1998, doi:10.24432/C50P49), licensed CC BY 4.0, as scikit-learn distributes it: 1,797 images of 8x8
pixels. Changed here: the values 0..16 are scaled to 0..255, the order is shuffled, and 36 images of each class are the
test split.
"""

import math
import zipfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from bitscape.data.cache import cache_file, read_cache, write_cache
from bitscape.data.decoding import crop_corner, decode_images, image_shape, resized_shape
from bitscape.data.encoded import EncodedRows, EncodedSource, numbered, read_folder, read_hub, read_parquet, split_folder
from bitscape.data.mapped import MEMORY_BYTES, decode_mapped
from bitscape.data.shards import SUFFIX, expand, read_shards
from bitscape.data.splits import Split, choose
from bitscape.errors import BitscapeError, nearest, prefixed
from bitscape.signatures import checked
from bitscape.tables import Shown, Table, shortened
from bitscape.words import counted

DIGITS_SPLITS = {"train": slice(0, 1437), "test": slice(1437, 1797)}
HUB = "hf"
CHANNELS = (1, 3)
NPZ_BYTES = {"images": MEMORY_BYTES, "labels": 2**27, "class_names": 2**26}
"""Arrays of an .npz file that are read, and the most that each may unpack to."""
MOST_UNPACKED = 100
"""Times its size in the file, for what unpacks to more than 256 MB: photos take up to 10, nothing but zeros takes 1,000."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset(Shown):
    """Images of one size, perhaps with labels. Raises BitscapeError for shapes, types and labels that do not fit."""

    name: str
    """What messages and records call it."""
    images: UInt8[Tensor, "n c h w"] = field(repr=False)
    """Pixels 0..255. Of a data set above 2 GB they lie in a file and can be read only (see `bitscape.data.mapped`)."""
    labels: Int64[Tensor, " n"] | None = field(default=None, repr=False)
    """Class numbers from 0, or None."""
    class_names: tuple[str, ...] = field(default=(), repr=False)
    """Name of each class; labels index into it."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
            raise BitscapeError(
                f"{self.name}: images are {images.dtype} of shape {tuple(images.shape)}; they must be uint8 "
                "(n, c, h, w), none of the sizes 0"
            )
        if labels is None:
            return
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise BitscapeError(
                f"{self.name}: labels are {labels.dtype} of shape {tuple(labels.shape)}; {len(images)} images need "
                f"int64 of shape ({len(images)},)"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.class_names):
            raise BitscapeError(
                f"{self.name}: labels run from {low} to {high}; {len(self.class_names)} class names allow 0 to {len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def table(self) -> Table:
        """Return how many images there are of the first and last classes."""
        title = f"Dataset {self.name}: {counted(len(self), 'image')} of {'x'.join(map(str, self.images.shape[1:]))}"
        if self.labels is None:
            return Table(title=f"{title}, no labels")
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        rows = [(name, str(count)) for name, count in zip(self.class_names, counts, strict=True)]
        title += f", {len(rows)} {'class' if len(rows) == 1 else 'classes'}"
        return Table(title=title, columns=("class", "images"), rows=shortened(rows))

    def subset(self, index: Tensor | slice, name: str | None = None) -> "Dataset":
        """The images that `index` picks: a slice, integers in 0..n-1 (repeats allowed), or n booleans."""
        if isinstance(index, Tensor):
            index = self._positions(index)
        labels = None if self.labels is None else self.labels[index]
        return Dataset(name or self.name, self.images[index], labels, self.class_names)

    def resized(self, size: int) -> "Dataset":
        """The shorter side becomes `size` pixels (bilinear, antialiased), then the centre size x size is kept."""
        shape = resized_shape(self.images.shape[2], self.images.shape[3], _positive("size", size))
        images = self.images
        if shape != tuple(images.shape[2:]):
            images = interpolate(images, shape, mode="bilinear", antialias=True, align_corners=False)
        return Dataset(self.name, images, self.labels, self.class_names).cropped(size)

    def cropped(self, size: int) -> "Dataset":
        """The centre size x size, as it is."""
        height, width = self.images.shape[2:]
        if _positive("size", size) > min(height, width):
            raise BitscapeError(f"{self.name}: size={size} exceeds the {height}x{width} images; use resized({size})")
        top, left = crop_corner(height, width, size)
        images = self.images[:, :, top : top + size, left : left + size].contiguous()
        return Dataset(self.name, images, self.labels, self.class_names)

    def _positions(self, index: Tensor) -> Tensor:
        if index.dtype == torch.bool and index.shape == (len(self),):
            return index
        if index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
            raise BitscapeError(f"index is {index.dtype} of shape {tuple(index.shape)}; allowed are integers (k,) or n booleans")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise BitscapeError(f"index runs from {int(index.min())} to {int(index.max())}; {self.name} has rows 0 to {len(self) - 1}")
        return index


@checked
def load_dataset(source: str, *, split: Split = "train", size: int | None = None, limit: int | None = None, seed: int = 0) -> Dataset:
    """Load images and labels.

    Args:
        source: "digits" (embedded), a .parquet file (encoded images), an .npz file (arrays `images`, perhaps `labels`
            and `class_names`), a folder of class folders or of images, tar files of images as WebDataset lays them out
            ("shards/train-{0000..0015}.tar", or a folder of them), or "hf:name" (needs the datasets library).
        split: for the digits ("train" or "test"), the hub, and folders that hold split folders; of several names the first that
            the source has. A single file has no splits.
        size: resize the shorter side to this many pixels and keep the centre size x size.
        limit: keep this many images, the first of an order drawn from `seed`: a smaller limit gives a prefix.
        seed: see `limit`.

    Encoded images become RGB; digits and npz keep their channels. Unreadable images are left out and logged. Only images
    that are kept are decoded, and never more than 2 GB of them are held in memory. A parquet file that is decoded as a
    whole is kept in the cache (see `bitscape.data.cache`). Raises BitscapeError for anything missing, damaged or
    inconsistent, and where more than a tenth of the images cannot be read.
    """
    for name, value in (("size", size), ("limit", limit)):
        if value is not None:
            _positive(name, value)
    check_source(source)
    if source == "digits":
        return _picked(_digits(split), size, limit, seed)
    if name := _hub_name(source):
        return _decoded(read_hub(name, split), source, size, limit, seed)
    path = Path(source)
    if path.suffix == SUFFIX:
        return _decoded(read_shards(expand(source), path.name), source, size, limit, seed)
    if path.is_dir():
        folder = split_folder(path, split)
        shards = sorted(folder.glob(f"*{SUFFIX}"))
        return _decoded(read_shards(shards, folder.name) if shards else read_folder(folder), source, size, limit, seed)
    if path.suffix == ".npz":
        return _picked(_read_npz(path), size, limit, seed)
    return _decoded(read_parquet(path), source, size, limit, seed, cache_file([path], size))


def check_source(source: str) -> None:
    """Raise BitscapeError for a source that is not there, or of no kind that `load_dataset` reads. It is not opened."""
    path = Path(source)
    if source == "digits" or _hub_name(source) or path.suffix == SUFFIX:
        return
    if not source or not path.exists():
        raise BitscapeError(_not_found(source))
    if not path.is_dir() and path.suffix not in (".npz", ".parquet"):
        raise BitscapeError(f"source {source!r} has the suffix {path.suffix!r}; allowed are .parquet, .npz, .tar or a folder")


def _hub_name(source: str) -> str:
    """Name of a data set on the hub; "" of any other source."""
    kind, _, name = source.partition(":")
    return name if kind == HUB else ""


def _digits(split: Split) -> Dataset:
    chosen = choose(split, DIGITS_SPLITS, "digits")
    with resources.as_file(resources.files("bitscape.data") / "digits.npz") as path:
        return _read_npz(path).subset(DIGITS_SPLITS[chosen], f"digits {chosen}")


def _read_npz(path: Path) -> Dataset:
    arrays = _arrays(path)
    images = _channels_first(arrays["images"], path)
    for name in arrays.keys() & {"labels", "class_names"}:
        if arrays[name].ndim != 1:
            raise BitscapeError(f"{path}: {name} have shape {arrays[name].shape}; allowed is one axis, (n,)")
    labels = _integer_labels(arrays["labels"], path) if "labels" in arrays else None
    with prefixed(path):
        names = tuple(str(name) for name in arrays["class_names"]) if "class_names" in arrays else numbered(labels)
        return Dataset(path.stem, torch.from_numpy(np.ascontiguousarray(images)), labels, names)


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file that a data set has; nothing else is read, and nothing of more than `NPZ_BYTES`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if "images" in entries:
                return {name: _array(archive, entries[name], most) for name, most in NPZ_BYTES.items() if name in entries}
    # Readers of zip, deflate, npy and its header raise a dozen types.
    except Exception as error:
        raise BitscapeError(f"{path}: damaged, or no .npz file of plain arrays ({error}); write it again") from error
    raise BitscapeError(f"{path}: no array 'images' among {', '.join(entries)}{nearest('images', entries)}")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most_bytes: int) -> Any:
    most_bytes = min(most_bytes, 2**28 + MOST_UNPACKED * entry.compress_size)
    if entry.file_size > most_bytes:
        raise ValueError(f"{entry.filename} unpacks to {entry.file_size:,} bytes; allowed are {most_bytes:,}")
    with archive.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _channels_first(images: Any, path: Path) -> Any:
    """Any of (n, h, w), (n, c, h, w) and (n, h, w, c) to (n, c, h, w)."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in CHANNELS:
        return images
    if images.ndim == 4 and images.shape[3] in CHANNELS:
        return images.transpose(0, 3, 1, 2)
    raise BitscapeError(
        f"{path}: images have shape {images.shape}; allowed are (n, h, w) and, with 1 or 3 channels, (n, c, h, w) or (n, h, w, c)"
    )


def _integer_labels(labels: Any, path: Path) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise BitscapeError(f"{path}: labels are {labels.dtype}; they must be integers")
    return torch.from_numpy(labels.astype(np.int64))


def _picked(dataset: Dataset, size: int | None, limit: int | None, seed: int) -> Dataset:
    picked = dataset if limit is None else dataset.subset(_rows(len(dataset), limit, seed))
    return picked if size is None else picked.resized(size)


def _decoded(source: EncodedSource, name: str, size: int | None, limit: int | None, seed: int, cache: Path | None = None) -> Dataset:
    rows = _rows(source.count, limit, seed)
    cached = read_cache(cache, source.count) if cache else None
    if cached is not None:
        images = torch.from_numpy(np.asarray(cached[rows.numpy()]))
    else:
        images, kept = _decoded_rows(source, rows, size, name, "" if limit is None else f"{limit} of {seed}")
        rows = rows[kept]
        if cache and limit is None and len(kept) == source.count:
            write_cache(cache, images.numpy())
    labels = None if source.labels is None else source.labels[rows]
    with prefixed(name):
        return Dataset(source.name, images, labels, source.class_names)


def _decoded_rows(source: EncodedSource, rows: Tensor, size: int | None, name: str, part: str) -> tuple[Tensor, Tensor]:
    """Images, and which of the rows they are; in memory where they are few."""
    encoded = EncodedRows(source, rows.tolist())
    shape = image_shape(encoded, size)
    if shape is None or not source.files or len(rows) * math.prod(shape) <= MEMORY_BYTES:
        return decode_images(encoded, size=size, source=name)
    return decode_mapped(encoded, shape, cache_file(source.files, size, part), size=size, source=name)


def _rows(count: int, limit: int | None, seed: int) -> Tensor:
    if limit is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]


def _positive(name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise BitscapeError(f"{name} is {value!r}; allowed are whole numbers from 1")
    return value


def _not_found(source: str) -> str:
    folder = Path(source).parent
    kind = source.partition(":")[0]
    if kind == HUB:
        return f"source {source!r} names no data set; write {HUB}:name"
    if ":" in source and len(kind) > 1:  # one letter is a drive
        return f"source {source!r}: no library {kind!r}{nearest(kind, [HUB])}; allowed is {HUB}:name"
    if not folder.is_dir():
        return f"source {source!r} is not there: no folder {str(folder)!r}"
    hint = nearest(Path(source).name, ["digits", *sorted(entry.name for entry in folder.iterdir())])
    return f"source {source!r} is not there{hint}; allowed are digits, a .parquet, .npz or .tar file, a folder, {HUB}:name"
