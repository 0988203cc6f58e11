"""Encoded images (files or bytes) to one uint8 tensor, decoded by several threads.

Greyscale, palette and CMYK images become RGB, transparency is dropped, and of an animation the first picture counts. Photos are
turned as their EXIF tag says, and 16-bit greys are cut to their high byte; both are counted in the log.
"""

import io
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, whatever a file is called: other readers of Pillow start programs (EPS: Ghostscript) or fetch what a file refers to."""
MOST_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: a quarter of a gigabyte as RGB
LARGE_PIXELS = 16_000_000  # above, images are decoded one by one: a few at a time take gigabytes
_one_large = threading.Lock()
CHUNK = 1024  # images in flight; bounds the memory held beside the result
MAX_WORKERS = 8
SHOWN_NAMES = 5  # a log line names this many images and counts the others
BAD_START = 1000  # so many, and more than half of those seen: the others need not be tried
BAD_SHARE = 10  # one image in so many may be unreadable; beyond, something else is wrong than a few files
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a photo upright, for each value of its orientation tag but 1."""


@dataclass(frozen=True)
class EncodedImage:
    """One image as it is stored."""

    name: str
    """What messages call it."""
    content: bytes | Path
    """The encoded bytes, or the file that holds them."""


def decode_images(
    encoded: Sequence[EncodedImage], *, size: int | None, source: str, into: Pixels | None = None
) -> tuple[UInt8[Tensor, "n 3 h w"], Int64[Tensor, " n"]]:
    """Decode to (images, positions in `encoded` that could be read).

    With `size`, the shorter side becomes `size` pixels and the centre size x size is kept. Unreadable images are left
    out and logged, and so are those that were converted. Only slices of `encoded` are taken, so that it may read its
    images when asked. into: where the pixels go, (len(encoded), 3, h, w); None = new memory.
    Raises BitscapeError, naming `source`, if there are none, if they differ in size, and as soon as more than a tenth
    of them cannot be read.
    """
    pixels, first = into, ""
    kept: list[int] = []
    broken: list[str] = []
    converted: list[str] = []
    for position, (image, found) in enumerate(track(_decoded(encoded, size), total=len(encoded), label="images decoded")):
        if found.note:
            (broken if found.pixels is None else converted).append(f"{image.name} ({found.note})")
        if len(broken) > len(encoded) // BAD_SHARE or len(broken) > max(BAD_START, (position + 1) // 2):
            raise BitscapeError(
                f"{source}: {_too_many(len(broken), position + 1, len(encoded))} cannot be read: {_listed(broken)}; remove or repair them"
            )
        if found.pixels is None:
            continue
        if pixels is None:
            pixels = np.empty((len(encoded), *found.pixels.shape), np.uint8)
        if found.pixels.shape != pixels.shape[1:]:
            raise BitscapeError(_size_mismatch(source, first, pixels.shape, image.name, found.pixels.shape))
        first = first or image.name
        pixels[len(kept)] = found.pixels
        kept.append(position)
    if pixels is None:
        raise BitscapeError(f"{source}: there are no images in it")
    if broken:
        _log.warning("%s: skipped %d of %d images, unreadable: %s", source, len(broken), len(encoded), _listed(broken))
    if converted:
        _log.info("%s: converted %d of %d images: %s", source, len(converted), len(encoded), _listed(converted))
    return torch.from_numpy(pixels[: len(kept)]), torch.tensor(kept)


def image_shape(encoded: Sequence[EncodedImage], size: int | None) -> tuple[int, ...] | None:
    """Shape (3, h, w) that `decode_images` gives each image: of the first that can be read; None if none of the first can."""
    if size is not None:
        return 3, size, size
    found = (_decode(encoded[row : row + 1][0].content, None) for row in range(min(CHUNK, len(encoded))))
    return next((image.pixels.shape for image in found if image.pixels is not None), None)


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the shorter side is `size`; the longer one is rounded down, as torchvision does."""
    if height <= width:
        return size, size * width // height
    return size * height // width, size


def crop_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """Top and left of the centre size x size, rounded as torchvision does."""
    return round((height - size) / 2), round((width - size) / 2)


@dataclass(frozen=True)
class _Decoded:
    pixels: Pixels | None
    """(3, h, w)."""
    note: str = ""
    """Why there are none, or what was done to them."""


def _decoded(encoded: Sequence[EncodedImage], size: int | None) -> Iterator[tuple[EncodedImage, _Decoded]]:
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(encoded), CHUNK):
            chunk = encoded[start : start + CHUNK]
            yield from zip(chunk, pool.map(lambda image: _decode(image.content, size), chunk), strict=True)


def _decode(content: bytes | Path, size: int | None) -> _Decoded:
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            _check_pixels(image.width, image.height)
            with _one_large if image.width * image.height > LARGE_PIXELS else nullcontext():
                image.load()
                rgb, note = _upright_rgb(image)
                return _Decoded(np.asarray(rgb if size is None else _resized(rgb, size)).transpose(2, 0, 1), note)
    except Exception as error:  # Pillow's readers raise anything for damaged files, depending on the format and on where the damage is
        # Pillow's text ends in the address of the buffer; the first part says enough
        return _Decoded(None, str(error).split(" <_io")[0] or type(error).__name__)


def _upright_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """The picture, and what was done to it that another reader might not do."""
    notes = []
    turn = _turn(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        notes.append("16 bits to 8")
    elif image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel, on no known scale")  # Pillow would clip it to white
    if turn is not None:
        image = image.transpose(turn)
        notes.append("turned upright")
    transparent = image.mode == "P" and "transparency" in image.info  # by way of RGBA Pillow does not warn
    return (image.convert("RGBA") if transparent else image).convert("RGB"), ", ".join(notes)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged tag is no damaged image
        return None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than {MOST_PIXELS:,}")


def _resized(image: Image.Image, size: int) -> Image.Image:
    height, width = resized_shape(image.height, image.width, size)
    top, left = crop_corner(height, width, size)
    _check_pixels(width, height)  # an image of 1 x 50,000 pixels would be stretched to gigabytes
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def _too_many(broken: int, tried: int, count: int) -> str:
    return f"more than a tenth of its {count} images" if broken > count // BAD_SHARE else f"{broken} of the first {tried} images"


def _size_mismatch(source: str, first: str, one: tuple[int, ...], second: str, other: tuple[int, ...]) -> str:
    shapes = [f"{name} is {shape[-2]}x{shape[-1]}" for name, shape in ((first, one), (second, other))]
    return (
        f"{source}: the images differ in size ({' and '.join(shapes)} pixels, height x width); give size=, for example "
        "size=224, to resize the shorter side and keep the centre"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
