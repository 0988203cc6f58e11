"""Tar files of images, as WebDataset lays them out: `0001.jpg` beside `0001.cls` or `0001.json`, one after the other.

Nothing is unpacked: the headers are read once, then each image where it lies. Compressed and sparse files have no such places.
"""

import io
import itertools
import json
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from bitscape.data.decoding import EncodedImage
from bitscape.data.encoded import IMAGE_SUFFIXES, LABEL_COLUMNS, MAX_CLASSES, EncodedSource, numbered
from bitscape.errors import BitscapeError, prefixed

SUFFIX = ".tar"
LABEL_FIELDS = ("cls", *LABEL_COLUMNS)
MOST_HEADER_BYTES = 2**20
"""Of the header of one file in a tar, and of a label: long names and times take hundreds of bytes, but a header may claim terabytes."""
MOST_IMAGE_BYTES = 2**28
_RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
MOST_FILES = 100_000
"""Of one pattern."""


@dataclass(frozen=True)
class _Place:
    """Bytes within a tar file."""

    name: str
    shard: int
    offset: int
    size: int


@dataclass
class _Sample:
    image: _Place | None = None
    label: int | None = None


def expand(pattern: str) -> list[Path]:
    """Files of "train-{0000..0015}.tar": both ends belong to the range, and as many digits as they have are written.

    Raises BitscapeError for a pattern of more than `MOST_FILES` files.
    """
    pieces = _RANGE.split(pattern)
    texts, lows, highs = pieces[::3], pieces[1::3], pieces[2::3]
    ranges = [range(int(low), int(high) + 1) for low, high in zip(lows, highs, strict=True)]
    count = math.prod(max(0, numbers.stop - numbers.start) for numbers in ranges)  # len fails beyond 64 bits
    if count > MOST_FILES:
        raise BitscapeError(f"{pattern!r} names {count:,} files; at most {MOST_FILES:,} are read: shorten its ranges")
    written = [[str(number).zfill(len(low)) for number in numbers] for low, numbers in zip(lows, ranges, strict=True)]
    return [Path("".join(itertools.chain(*zip(texts, [*numbers, ""], strict=True)))) for numbers in itertools.product(*written)]


def read_shards(paths: Sequence[Path], name: str) -> EncodedSource:
    """List the images of tar files; labels are the numbers in `.cls`, or those called cls, label, labels or fine_label in `.json`.

    Files of one sample share their folder and their name up to its first dot, and follow each other. Raises BitscapeError for a tar
    file that is missing, damaged or compressed, for samples without an image, and for labels that are no integers or that only some have.
    """
    samples = [sample for shard, path in enumerate(paths) for sample in _samples(shard, path)]
    places = [sample.image for sample in samples if sample.image is not None]
    labelled = [sample.label for sample in samples if sample.label is not None]
    if not places:
        raise BitscapeError(f"{name}: no images in its {len(paths)} tar files; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    if labelled and any((sample.image is None) != (sample.label is None) for sample in samples):
        raise BitscapeError(
            f"{name}: {len(places)} images, {len(labelled)} labels in .cls or .json; each image needs one beside it, or none has one"
        )

    def fetch(rows: list[int]) -> list[EncodedImage]:
        found = {row: _content(paths, places[row]) for row in sorted(rows, key=lambda row: (places[row].shard, places[row].offset))}
        return [EncodedImage(places[row].name, found[row]) for row in rows]

    labels = torch.tensor(labelled) if labelled else None
    with prefixed(name):
        named = numbered(labels)
    return EncodedSource(name=name, count=len(places), labels=labels, class_names=named, fetch=fetch, files=tuple(paths))


def _samples(shard: int, path: Path) -> Iterator[_Sample]:
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for _, of in itertools.groupby(_members(tar), lambda member: _key(member.name)):
                yield _sample(shard, path, tar, of)
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError) as error:
        if isinstance(error, BitscapeError):
            raise
        raise BitscapeError(f"{path}: damaged, compressed, or no tar file ({error}); copy it again, or unpack its compression") from error


class _Bounded(io.FileIO):
    """A file of which no more than `MOST_HEADER_BYTES` are read at once, whatever a header in it claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes; allowed are {MOST_HEADER_BYTES:,}")
        return super().read(size)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, one after the other."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
        if member.isfile():
            yield member


def _key(member: str) -> tuple[str, str]:
    path = PurePosixPath(member)
    return str(path.parent), path.name.partition(".")[0]


def _sample(shard: int, path: Path, tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo]) -> _Sample:
    sample = _Sample()
    for member in members:
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix in IMAGE_SUFFIXES and sample.image is not None:
            raise BitscapeError(f"{path}: {member.name} is the second image of its sample; name them apart before the first dot")
        if suffix in IMAGE_SUFFIXES:
            _check_size(path, member, MOST_IMAGE_BYTES)
            sample.image = _Place(f"{path.name}/{member.name}", shard, member.offset_data, member.size)
        elif suffix in (".cls", ".json"):
            _check_size(path, member, MOST_HEADER_BYTES)
            stream = tar.extractfile(member)
            assert stream is not None  # of a file there is one
            found = _label(stream.read(), suffix, f"{path}/{member.name}")
            sample.label = sample.label if found is None else found
    return sample


def _check_size(path: Path, member: tarfile.TarInfo, most_bytes: int) -> None:
    if member.issparse():
        raise BitscapeError(f"{path}: {member.name} is stored as a sparse file; write the tar without --sparse")
    if not 0 <= member.size <= most_bytes:
        raise BitscapeError(f"{path}: {member.name} has {member.size:,} bytes; allowed are {most_bytes:,}: damaged, or no image or label")


def _label(content: bytes, suffix: str, where: str) -> int | None:
    """The class number in a .cls file, or in a .json file, which may have none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = content[:20]
    if suffix == ".json" and isinstance(value, dict):
        value = next((value[field] for field in LABEL_FIELDS if field in value), None)
        if value is None:
            return None
    if type(value) is not int or not 0 <= value < MAX_CLASSES:
        raise BitscapeError(f"{where}: the label is {value!r}; it must be a whole number from 0 to {MAX_CLASSES - 1}")
    return value


def _content(paths: Sequence[Path], place: _Place) -> bytes:
    with paths[place.shard].open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)
