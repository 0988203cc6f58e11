"""The types that networks and images must have, checked at the door."""

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError


def check_float32(model: nn.Module, argument: str = "model") -> None:
    """Raise BitscapeError unless every floating-point parameter of `model` is float32.

    Scales, codes and exported files are float32. A network may well autocast within its forward.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise BitscapeError(
                f"{argument}: parameter {name} is {parameter.dtype}; the network must be float32: call {argument}.float() first"
            )


def check_images(images: object, argument: str = "images", *, model: nn.Module | None = None) -> None:
    """Raise BitscapeError unless `images` is a float32 tensor, of any shape and on any device.

    A `model` with an nn.Embedding may take int64 indices too.
    """
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise BitscapeError(f"{argument}: a {kind} where a tensor is needed; give float32 tensors (n, c, h, w), without labels")
    indexes = model is not None and any(isinstance(module, nn.Embedding) for module in model.modules())
    if images.dtype != torch.float32 and not (indexes and images.dtype == torch.int64):
        advice = (
            f"call {argument}.float()"
            if images.is_floating_point()
            else f"normalize them for the network (Normalization.apply makes them from uint8, {argument}.float() changes the type alone)"
        )
        raise BitscapeError(f"{argument}: {images.dtype}; give a float32 tensor: {advice}")
