"""What images a network was trained with, as its own configuration tells it: those of timm and Hugging Face have one."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitscape.errors import BitscapeError


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Images that a network expects."""

    mean: tuple[float, ...]
    """Of each channel, on the scale 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, on the same scale."""
    size: int | None
    """Side of the square in pixels; None where the configuration does not tell."""


def image_config(model: nn.Module) -> ImageConfig:
    """Return what the network's own configuration says. Raises BitscapeError where there is none, or one that this does not understand."""
    try:
        own = getattr(model, "pretrained_cfg", None)
        if own and "mean" in own:
            return ImageConfig(mean=_numbers(own["mean"]), std=_numbers(own["std"]), size=_side(own["input_size"][1:]))
        if type(model).__module__.partition(".")[0] == "transformers":
            return _of_processor(_processor(str(getattr(model, "name_or_path", ""))))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BitscapeError(f"model: the configuration of its images cannot be used: {type(error).__name__}: {error}") from error
    raise BitscapeError(f"model: {type(model).__name__} has no configuration that tells its images; networks of timm: and hf: have one")


def _processor(name: str) -> Mapping[str, Any]:
    mixin = importlib.import_module("transformers.image_processing_base").ImageProcessingMixin
    found: Mapping[str, Any] = mixin.get_image_processor_dict(name)[0]
    return found


def _of_processor(config: Mapping[str, Any]) -> ImageConfig:
    """A preprocessor_config.json: the crop decides on the size where there is one, and values may be left as 0..1."""
    cropped = config.get("do_center_crop") and config.get("crop_size")
    size = _side(config["crop_size"] if cropped else config.get("size"))
    if not config.get("do_normalize", True):
        return ImageConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), size=size)
    return ImageConfig(mean=_numbers(config["image_mean"]), std=_numbers(config["image_std"]), size=size)


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _side(size: Any) -> int | None:
    """A number, {"shortest_edge": n}, {"height": n, "width": n} or (n, n). Raises ValueError for sides that differ."""
    given = size.values() if isinstance(size, Mapping) else size if isinstance(size, list | tuple) else [] if size is None else [size]
    sides = {int(side) for side in given}
    if len(sides) > 1:
        raise ValueError(f"the images are no squares: {size}")
    return next(iter(sides), None)
