"""Encoded images (files or bytes) to one uint8 tensor, decoded by several threads.

Greyscale, palette and CMYK images become RGB. An orientation tag in a photo (EXIF) is not applied.
"""

import io
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.progress import track

_log = logging.getLogger("bitscape.data")

Pixels = npt.NDArray[np.uint8]
# What Pillow's readers raise for damaged files, depending on the format and on where the damage is.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)
CHUNK = 1024  # images in flight; bounds the memory held beside the result
MAX_WORKERS = 8
SHOWN_NAMES = 5  # a warning names this many broken images and counts the others


@dataclass(frozen=True)
class EncodedImage:
    """One image as it is stored."""

    name: str
    """What messages call it."""
    content: bytes | Path
    """The encoded bytes, or the file that holds them."""


def decode_images(
    encoded: Sequence[EncodedImage], *, size: int | None, source: str
) -> tuple[UInt8[Tensor, "n 3 h w"], Int64[Tensor, " n"]]:
    """Decode to (images, positions in `encoded` that could be read).

    With `size`, the shorter side becomes `size` pixels and the centre size x size is kept. Unreadable images are left
    out and logged. Raises BitscapeError, naming `source`, if none can be read or if they differ in size.
    """
    pixels: Pixels | None = None
    kept: list[int] = []
    broken: list[str] = []
    for position, found in enumerate(track(_decoded(encoded, size), total=len(encoded), label="images decoded")):
        if isinstance(found, str):
            broken.append(f"{encoded[position].name} ({found})")
            continue
        if pixels is None:
            pixels = np.empty((len(encoded), *found.shape), np.uint8)
        if found.shape != pixels.shape[1:]:
            raise BitscapeError(_size_mismatch(source, encoded[kept[0]], pixels[0], encoded[position], found))
        pixels[len(kept)] = found
        kept.append(position)
    if pixels is None:
        first = f"; the first: {broken[0]}" if broken else ""
        raise BitscapeError(f"{source}: none of its {len(encoded)} images can be read{first}")
    if broken:
        _log.warning("%s: skipped %d of %d images, unreadable: %s", source, len(broken), len(encoded), _listed(broken))
    return torch.from_numpy(pixels[: len(kept)]), torch.tensor(kept)


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the shorter side is `size`; the longer one is rounded down, as torchvision does."""
    if height <= width:
        return size, size * width // height
    return size * height // width, size


def crop_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """Top and left of the centre size x size, rounded as torchvision does."""
    return round((height - size) / 2), round((width - size) / 2)


def _decoded(encoded: Sequence[EncodedImage], size: int | None) -> Iterator[Pixels | str]:
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(encoded), CHUNK):
            yield from pool.map(lambda image: _decode(image.content, size), encoded[start : start + CHUNK])


def _decode(content: bytes | Path, size: int | None) -> Pixels | str:
    """Pixels (3, h, w), or why there are none."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.mode.startswith(("I", "F")):
                return f"mode {image.mode} has more than 8 bits a channel"  # Pillow would clip it to white
            rgb = image.convert("RGB")
    except (*BROKEN, Image.DecompressionBombError) as error:
        # Pillow's text ends in the address of the buffer; the first part says enough
        return str(error).split(" <_io")[0] or type(error).__name__
    return np.asarray(rgb if size is None else _resized(rgb, size)).transpose(2, 0, 1)


def _resized(image: Image.Image, size: int) -> Image.Image:
    height, width = resized_shape(image.height, image.width, size)
    top, left = crop_corner(height, width, size)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def _size_mismatch(source: str, first: EncodedImage, one: Pixels, second: EncodedImage, other: Pixels) -> str:
    shapes = [f"{image.name} is {p.shape[1]}x{p.shape[2]}" for image, p in ((first, one), (second, other))]
    return (
        f"{source}: the images differ in size ({' and '.join(shapes)} pixels, height x width); give size=, for example "
        "size=224, to resize the shorter side and keep the centre"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
