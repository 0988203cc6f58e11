"""Images of known quality: ten corruptions, each of severity 1 to 5.

Paper     Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019
          (arXiv 1903.12261); the strengths are those of its 32x32 images, CIFAR-10-C.
Departs   Values are rounded to whole pixels, where the benchmark's code cuts them off, so an unchanged pixel stays what it
          was. Both blurs repeat the edge pixel; the benchmark's defocus mirrors the image there. The random numbers are
          other ones, so noise equals the published files in distribution only. Other image sizes keep the same strengths.
Random    The result for an image depends on (image, corruption, severity, seed, its row) alone, to the last bit: batches,
          threads and other images do not matter. The severities of a noise share their random numbers, so that 5 is more
          of what 1 has; only shot noise does not scale that way, as its draws depend on the rate.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from bitscape.data.sources import Dataset
from bitscape.errors import BitscapeError, nearest

Generators = Iterable[torch.Generator]  # one for each image; made only when asked for
Corruption = Callable[[Tensor, int, Generators], Tensor]
SEVERITIES = range(1, 6)
CLEAN = "clean"
PIECE_VALUES = 2**21  # pixel values in flight: 8 MB for each float copy


def gaussian_noise(images: UInt8[Tensor, "n 3 h w"], severity: int, generators: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """x + N(0, std), x in 0..1."""
    std = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return _pixels(_unit(images) + std * _normal(images, generators))


def shot_noise(images: UInt8[Tensor, "n 3 h w"], severity: int, generators: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """Poisson(x * rate) / rate."""
    rate = (500, 250, 100, 75, 50)[severity - 1]
    counts = [torch.poisson(image, generator=generator) for image, generator in zip(_unit(images) * rate, generators, strict=True)]
    return _pixels(torch.stack(counts) / rate)


def impulse_noise(images: UInt8[Tensor, "n 3 h w"], severity: int, generators: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """This share of the values becomes 0 or 255, half each; the channels of a pixel are drawn apart."""
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    drawn = torch.stack([torch.rand(images.shape[1:], generator=generator) for generator in generators])
    return images.masked_fill(drawn < amount / 2, 0).masked_fill(drawn >= 1 - amount / 2, 255)


def speckle_noise(images: UInt8[Tensor, "n 3 h w"], severity: int, generators: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """x + x * N(0, std)."""
    std = (0.06, 0.10, 0.12, 0.16, 0.20)[severity - 1]
    unit = _unit(images)
    return _pixels(unit + unit * (std * _normal(images, generators)))


def gaussian_blur(images: UInt8[Tensor, "n 3 h w"], severity: int, _: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """Gaussian of this many pixels, cut at 4 sigma."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    taps = _gaussian_taps(sigma, round(4 * sigma))
    return _pixels(_filtered(_filtered(_unit(images), taps[:, None]), taps[None, :]))


def defocus_blur(images: UInt8[Tensor, "n 3 h w"], severity: int, _: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """Disk of a radius, its edge softened by a 3x3 Gaussian. Severities 1 to 3 are a disk of one pixel: the Gaussian alone."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    return _pixels(_filtered(_unit(images), _disk_taps(radius, alias)))


def brightness(images: UInt8[Tensor, "n 3 h w"], severity: int, _: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """Added to the value of HSV, which scales the three channels alike; black becomes gray."""
    shift = (0.05, 0.10, 0.15, 0.20, 0.30)[severity - 1]
    unit = _unit(images)
    value = unit.amax(1, keepdim=True)
    brighter = (value + shift).clamp(max=1)
    return _pixels(torch.where(value > 0, unit * (brighter / value), brighter))


def contrast(images: UInt8[Tensor, "n 3 h w"], severity: int, _: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """(x - mean) * factor + mean, with the mean of each channel of each image."""
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    total = images.sum((2, 3), keepdim=True)  # of integers, hence exact in any order
    mean = total / (255 * images.shape[2] * images.shape[3])
    return _pixels((_unit(images) - mean) * factor + mean)


def jpeg(images: UInt8[Tensor, "n 3 h w"], severity: int, _: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """Through a JPEG file of this quality, as Pillow writes and reads it."""
    quality = (80, 65, 58, 50, 40)[severity - 1]
    return _each_picture(images, lambda picture: _through_jpeg(picture, quality))


def pixelate(images: UInt8[Tensor, "n 3 h w"], severity: int, _: Generators) -> UInt8[Tensor, "n 3 h w"]:
    """To this share of height and width and back, both with Pillow's box filter."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[2:]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return _each_picture(images, lambda picture: picture.resize(small, box).resize((width, height), box))


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        speckle_noise,
        gaussian_blur,
        defocus_blur,
        brightness,
        contrast,
        jpeg,
        pixelate,
    )
}
TRAINED = ("gaussian_noise", "gaussian_blur", "jpeg", "brightness", "contrast")
HELD_OUT = ("shot_noise", "defocus_blur", "pixelate")


@dataclass(frozen=True, eq=False)
class Quality:
    """What happened to each image of `randomly_corrupted`."""

    names: tuple[str, ...]
    """ "clean", then the corruptions."""
    corruption: Int64[Tensor, " n"] = field(repr=False)
    """Index into `names`."""
    severity: Int64[Tensor, " n"] = field(repr=False)
    """1 to 5; 0 for a clean image."""


def corrupt(
    images: UInt8[Tensor, "n 3 h w"], name: str, severity: int, *, seed: int, rows: Int64[Tensor, " n"] | None = None
) -> UInt8[Tensor, "n 3 h w"]:
    """Corrupt every image in the same way, with its own random numbers; computed on the CPU, returned where `images` is.

    rows: the number of each image, by default 0..n-1; a part of a data set gets what the whole would with its rows there.

    Raises BitscapeError for an unknown name, another severity than 1..5, other images than uint8 (n, 3, h, w), and rows
    that are not one integer for each image.
    """
    _check_name("name", name)
    if type(severity) is not int or severity not in SEVERITIES:
        raise BitscapeError(f"severity is {severity!r}; allowed are whole numbers 1 to 5")
    _check_images(images)
    numbers = _row_numbers(rows, len(images))
    result = torch.empty_like(images)
    step = max(1, PIECE_VALUES // images[0].numel())
    for start in range(0, len(images), step):
        piece = slice(start, start + step)
        generators = (_generator(seed, name, row) for row in numbers[piece])
        result[piece] = CORRUPTIONS[name](images[piece].cpu(), severity, generators)
    return result


def corrupted(dataset: Dataset, name: str, severity: int, *, seed: int) -> Dataset:
    """The dataset with every image corrupted, and its labels as they are. Raises BitscapeError as `corrupt` does."""
    images = corrupt(dataset.images, name, severity, seed=seed)
    return Dataset(f"{dataset.name} {name} {severity}", images, dataset.labels, dataset.class_names)


def randomly_corrupted(dataset: Dataset, *, seed: int, corruptions: Sequence[str] = TRAINED, together: int = 1) -> tuple[Dataset, Quality]:
    """Each image clean or under one of `corruptions`, all equally likely; a corruption in any of its five severities.

    together: as many images in a row share corruption and severity: with the batch size, and without shuffling, batches are
    homogeneous; with 1 each batch is a mixture.
    Labels and order stay. A corrupted image is the one that `corrupted` gives in its place with the same seed.
    Raises BitscapeError as `corrupt` does, for no corruptions or repeated ones, and for `together` below 1.
    """
    if together < 1:
        raise BitscapeError(f"together is {together}; allowed are 1 for images that are drawn apart, or more, such as the batch size")
    if not corruptions or len(set(corruptions)) < len(corruptions):
        raise BitscapeError(f"corruptions is {corruptions!r}; allowed are one or more of {', '.join(CORRUPTIONS)}, each once")
    for name in corruptions:
        _check_name("corruptions", name)
    _check_images(dataset.images)
    drawn = _drawn_quality(-(-len(dataset) // together), seed, corruptions)
    each = torch.arange(len(dataset)) // together
    quality = Quality(drawn.names, drawn.corruption[each], drawn.severity[each])
    images = dataset.images.clone()
    for index, name in enumerate(corruptions, start=1):
        for severity in SEVERITIES:
            rows = ((quality.corruption == index) & (quality.severity == severity)).nonzero()[:, 0]
            if len(rows):
                images[rows] = corrupt(dataset.images[rows], name, severity, seed=seed, rows=rows)
    return Dataset(f"{dataset.name} of mixed quality", images, dataset.labels, dataset.class_names), quality


def _drawn_quality(count: int, seed: int, corruptions: Sequence[str]) -> Quality:
    corruption = torch.randint(len(corruptions) + 1, (count,), generator=_generator(seed, "mixed", "corruption"))
    severity = torch.randint(1, len(SEVERITIES) + 1, (count,), generator=_generator(seed, "mixed", "severity"))
    return Quality((CLEAN, *corruptions), corruption, severity.masked_fill(corruption == 0, 0))


def _generator(seed: int, name: str, part: int | str) -> torch.Generator:
    # Hashed to the 32 bits that the CPU generator takes: sums of seed and row would repeat streams.
    digest = hashlib.sha256(f"{seed}/{name}/{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _unit(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    return images / 255


def _pixels(unit: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 3 h w"]:
    return unit.clamp(0, 1).mul(255).round().to(torch.uint8)


def _normal(images: UInt8[Tensor, "n 3 h w"], generators: Generators) -> Float[Tensor, "n 3 h w"]:
    return torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])


def _gaussian_taps(sigma: float, reach: int) -> Float[Tensor, " taps"]:
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return taps / taps.sum()


def _disk_taps(radius: float, alias: float) -> Float[Tensor, "size size"]:
    offsets = torch.arange(-int(radius) - 1, int(radius) + 2)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()
    soft = _gaussian_taps(alias, 1)
    return _filtered(_filtered((disk / disk.sum())[None, None], soft[:, None]), soft[None, :])[0, 0]


def _filtered(values: Float[Tensor, "n c h w"], taps: Float[Tensor, "k l"]) -> Float[Tensor, "n c h w"]:
    """Weighted sum over the neighborhood of each value; the edge is repeated outwards."""
    height, width = values.shape[2:]
    down, right = taps.shape[0] // 2, taps.shape[1] // 2
    padded = pad(values, (right, right, down, down), mode="replicate")
    total = torch.zeros_like(values)
    # Tap by tap, not conv2d, whose order of summation, hence the last bit, depends on the size of the batch
    for row, column in taps.nonzero().tolist():
        total += padded[:, :, row : row + height, column : column + width] * float(taps[row, column])
    return total


def _each_picture(images: UInt8[Tensor, "n 3 h w"], change: Callable[[Image.Image], Image.Image]) -> UInt8[Tensor, "n 3 h w"]:
    pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])
    return torch.from_numpy(changed).permute(0, 3, 1, 2)


def _through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file, formats=("JPEG",))


def _check_name(argument: str, name: str) -> None:
    if name not in CORRUPTIONS:
        raise BitscapeError(f"{argument}: no corruption {name!r}{nearest(str(name), CORRUPTIONS)}; allowed are {', '.join(CORRUPTIONS)}")


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise BitscapeError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; they must be uint8 (n, 3, h, w), none of the sizes 0; "
            "repeat a single channel three times"
        )


def _row_numbers(rows: Tensor | None, count: int) -> Sequence[int]:
    if rows is None:
        return range(count)
    if rows.dtype != torch.int64 or rows.shape != (count,):
        raise BitscapeError(f"rows are {rows.dtype} of shape {tuple(rows.shape)}; {count} images need int64 of shape ({count},)")
    numbers: list[int] = rows.tolist()
    return numbers
