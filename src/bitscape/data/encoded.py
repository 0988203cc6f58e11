"""Data sets of encoded images: parquet files, folders and the Hugging Face hub, all seen as one `EncodedSource`.

Images are read in the pieces in which they are decoded, so that a data set may be larger than memory.
"""

import bisect
import importlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitscape.data.decoding import EncodedImage
from bitscape.data.splits import Split, are_splits, choose, log_default
from bitscape.errors import BitscapeError, nearest, prefixed

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
MAX_CLASSES = 1_000_000  # beyond, the numbers are no classes: something else is in the label column
MAX_ROWS = 10_000_000
"""Of a parquet file: a few bytes of it can stand for billions of equal rows."""
READ_ROWS = 16
"""Images of a parquet file that are unpacked at once: row groups may be of any size."""
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSource:
    """Encoded images that are fetched only when asked for."""

    name: str
    """What the data set is called."""
    count: int
    """Images there are."""
    labels: Tensor | None
    """int64 (count,), or None."""
    class_names: tuple[str, ...]
    """Empty when there are no labels; the numbers as text when the source names no classes."""
    fetch: Callable[[list[int]], Sequence[EncodedImage]]
    """Row numbers to their images."""
    files: tuple[Path, ...] = ()
    """What it is read from: while their times and lengths stay, so do the images. Empty where nobody knows."""


@dataclass(frozen=True)
class EncodedRows(Sequence[EncodedImage]):
    """Some rows of a source; a slice fetches its images."""

    source: EncodedSource
    """Where they come from."""
    rows: list[int]
    """Their numbers there."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.source.fetch(self.rows[index]) if isinstance(index, slice) else self.source.fetch([self.rows[index]])[0]


def read_parquet(path: Path) -> EncodedSource:
    """Open a parquet file: an image column (bytes, or a struct of `bytes` and `path`) and, if any, integer labels."""
    arrow = _import("pyarrow", extra="data", need=f"reading {path.name}")
    parquet = _import("pyarrow.parquet", extra="data", need=f"reading {path.name}")

    def read(column: str) -> Any:
        return parquet.read_table(path, columns=[column])[column]

    def fetch(rows: list[int]) -> list[EncodedImage]:
        with _readable(path, arrow.ArrowException):
            cells = groups.cells(rows)
        # a path in a file from elsewhere is a name only, never opened
        return [_cell(row, cell) for row, cell in zip(rows, cells, strict=True)]

    with _readable(path, arrow.ArrowException):
        opened = parquet.ParquetFile(path)
        ends = list(itertools.accumulate(opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)))
        schema, count = opened.schema_arrow, opened.metadata.num_rows
        opened.close()
    if not 0 <= count <= MAX_ROWS:
        raise BitscapeError(f"{path}: {count:,} rows; allowed are {MAX_ROWS:,} in one file: damaged, or to be split into several")
    image_column, label_column = _columns(schema.names, str(path))

    def images(group: int) -> Iterator[Any]:
        batches = parquet.ParquetFile(path).iter_batches(
            READ_ROWS, row_groups=[group], columns=[image_column], use_threads=False
        )
        return (batch.column(0) for batch in batches)

    groups = _RowGroups(images, ends)
    with _readable(path, arrow.ArrowException):
        labels = _integers(_numbers(read(label_column)), f"{path}: column {label_column!r}") if label_column else None
    if labels is not None and len(labels) != count:
        raise BitscapeError(f"{path}: damaged: {len(labels)} labels for {count} images; copy it again")
    with prefixed(path):
        named = _class_names(labels, _names_in_metadata(schema.metadata or {}, label_column))
    return EncodedSource(name=path.stem, count=count, labels=labels, class_names=named, fetch=fetch, files=(path,))


def read_folder(folder: Path) -> EncodedSource:
    """List a folder of class folders (sorted names are the classes), or a flat folder of images without labels."""
    flat = [file for file in sorted(folder.iterdir()) if _is_image(file)]
    found = [] if flat else [(file, label) for label, of in enumerate(_subfolders(folder)) for file in _images(of)]
    if flat and any(_images(of) for of in _subfolders(folder)):
        raise BitscapeError(f"{folder}: holds both images and folders of images; keep one of the two in a folder")
    if not flat and not found:
        raise BitscapeError(f"{folder}: no images in it; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    files = flat or [file for file, _ in found]

    def fetch(rows: list[int]) -> list[EncodedImage]:
        return [EncodedImage(str(files[row].relative_to(folder)), files[row]) for row in rows]

    labels = None if flat else torch.tensor([label for _, label in found])
    named = () if flat else tuple(of.name for of in _subfolders(folder))
    return EncodedSource(name=folder.name, count=len(files), labels=labels, class_names=named, fetch=fetch, files=tuple(files))


def read_hub(name: str, split: Split) -> EncodedSource:
    """Open a split of a data set of the Hugging Face hub through the `datasets` library, which downloads and keeps it."""
    if not _HUB_NAME.fullmatch(name):  # the datasets library would take a folder for one
        raise BitscapeError(f"hf:{name}: not a name on the hub; write hf:name or hf:owner/name, and a folder without hf:")
    datasets = _import("datasets", extra="huggingface", need=f"hf:{name}")
    table, chosen = _hub_table(datasets, name, split)
    image_column, label_column = _columns(table.column_names, f"hf:{name}")
    table = table.cast_column(image_column, datasets.Image(decode=False))

    def fetch(rows: list[int]) -> list[EncodedImage]:
        cells = [row[image_column] for row in table.select_columns([image_column]).select(rows)]
        return [_cell(row, cell, _hub_folders(datasets)) for row, cell in zip(rows, cells, strict=True)]

    labels = _integers(list(table[label_column]), f"hf:{name}: column {label_column!r}") if label_column else None
    named = _class_names(labels, getattr(table.features[label_column], "names", ()) if label_column else ())
    cached = [] if "[" in chosen else getattr(table, "cache_files", [])  # slices of a split share its files
    files = tuple(Path(file["filename"]) for file in cached)
    return EncodedSource(name=name, count=len(table), labels=labels, class_names=named, fetch=fetch, files=files)


def _hub_table(datasets: Any, name: str, split: Split) -> tuple[Any, str]:
    """The table of a split, and the name of the split: the first of several that the data set has."""
    first, *others = (split,) if isinstance(split, str) else split
    try:
        table = datasets.load_dataset(name, split=first, trust_remote_code=False)
    except (ValueError, OSError) as error:
        if others and "Unknown split" in str(error):
            table, first = _hub_table(datasets, name, tuple(others))
            log_default(split, first, f"hf:{name}")
            return table, first
        raise BitscapeError(f"hf:{name}, split {first!r}: the datasets library cannot load it: {error}") from error
    return table, first


@dataclass
class _RowGroups:
    """The cells of a parquet file's image column, read forward within a group of rows; in memory are a few of them."""

    read: Callable[[int], Iterator[Any]]
    """A group to arrays of its cells, one after the other."""
    ends: list[int]
    """Row after the last one of each group."""
    group: int = -1
    """The group that is being read."""
    left: Iterator[Any] = field(default_factory=lambda: iter(()))
    """Its arrays after `array`."""
    start: int = 0
    """First row of `array`."""
    array: Any = ()
    """Cells that were read last."""

    def cells(self, rows: list[int]) -> list[Any]:
        """The cells of rows in any order. Raises IndexError if a group has fewer rows than the file says."""
        equal: dict[Any, Any] = {}  # cells that are equal are held once: a file may repeat a large one many times
        by_row = {row: self._cell(row, equal) for row in sorted(set(rows))}
        return [by_row[row] for row in rows]

    def _cell(self, row: int, equal: dict[Any, Any]) -> Any:
        group = bisect.bisect_right(self.ends, row)
        if group != self.group or row < self.start:
            self.group, self.start, self.array = group, self.ends[group - 1] if group else 0, ()
            self.left = self.read(group)
        while row >= self.start + len(self.array):
            self.start += len(self.array)
            self.array = ()  # freed before the next one is read
            self.array = next(self.left, None)
            if self.array is None:
                self.group = -1
                raise IndexError(f"group {group} ends before row {row}")
        cell = self.array[row - self.start].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        content = equal.setdefault(content, content) if isinstance(content, bytes) else content
        return {**cell, "bytes": content} if isinstance(cell, dict) else content


def numbered(labels: Tensor | None) -> tuple[str, ...]:
    """Class names "0", "1", ... for labels that come without names."""
    if labels is None or not len(labels):
        return ()
    if int(labels.max()) >= MAX_CLASSES:
        raise BitscapeError(f"the largest label is {int(labels.max())}; classes must be numbered 0 to {MAX_CLASSES - 1}")
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def _import(module: str, *, extra: str, need: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise BitscapeError(f"{need} needs {library}: pip install 'bitscape[{extra}]' ({error})") from error


@contextmanager
def _readable(path: Path, arrow_error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (arrow_error, OSError, UnicodeDecodeError, IndexError) as error:  # fewer rows than the file says are an IndexError
        raise BitscapeError(f"{path}: damaged, or no parquet file ({error}); copy it again") from error


def _columns(names: Sequence[str], source: str) -> tuple[str, str | None]:
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise BitscapeError(
            f"{source}: no image column among {', '.join(names)}{nearest(IMAGE_COLUMNS[0], names)}; it must be called "
            f"{' or '.join(IMAGE_COLUMNS)}"
        )
    return image, next((name for name in LABEL_COLUMNS if name in names), None)


def _numbers(column: Any) -> Any:
    """A column of a parquet file as an array if it holds whole numbers only, else as a list."""
    whole = column.null_count == 0 and str(column.type).lstrip("u").startswith("int")
    return column.to_numpy() if whole else column.to_pylist()


def _integers(values: Any, what: str) -> Tensor:
    """Labels as int64. Raises BitscapeError for the first of a list, or of an array of whole numbers, that is not a class."""
    if isinstance(values, np.ndarray):
        bad = np.flatnonzero((values < 0) | (values >= MAX_CLASSES))[:1].tolist()
    else:
        bad = [row for row, value in enumerate(values) if type(value) is not int or not 0 <= value < MAX_CLASSES][:1]
    for row in bad:
        value = values[row].item() if isinstance(values, np.ndarray) else values[row]
        raise BitscapeError(f"{what} holds {value!r} in row {row}; labels must be integers from 0 to {MAX_CLASSES - 1}")
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _hub_folders(datasets: Any) -> list[Path]:
    """Where the datasets library keeps what it downloads."""
    names = ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")
    found = [getattr(datasets.config, name, None) for name in names] + [os.environ.get("HF_HUB_CACHE")]
    return [Path(folder).resolve() for folder in found if folder]


def _cell(row: int, cell: Any, folders: Sequence[Path] = ()) -> EncodedImage:
    """The image of one table cell; without content it is empty bytes, which decoding reports as broken.

    A path in a table from elsewhere is opened only below one of `folders`.
    """
    fields = cell if isinstance(cell, dict) else {"bytes": cell}
    content, path = fields.get("bytes"), fields.get("path")
    if not isinstance(content, bytes):
        named = Path(path or "")
        content = named if path and any(named.resolve().is_relative_to(folder) for folder in folders) else b""
    return EncodedImage(path or f"row {row}", content)


def _names_in_metadata(metadata: dict[bytes, bytes], label_column: str | None) -> Sequence[str]:
    """Class names that the datasets library leaves in a parquet file; none when they are absent or unreadable."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _class_names(labels: Tensor | None, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names) or numbered(labels)


def split_folder(path: Path, split: Split) -> Path:
    """The folder of the split where the subfolders are splits (see `are_splits`), else `path` itself."""
    names = [folder.name for folder in _subfolders(path)]
    return path / choose(split, names, path) if are_splits(names) else path


def _subfolders(path: Path) -> list[Path]:
    return sorted(of for of in path.iterdir() if of.is_dir() and not of.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if _is_image(file))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
