"""Cheap measures of an image, and of a layer's input, that tell how good the image is."""

import torch
from torch import Tensor
from torch.nn import functional

IMAGE_FEATURES = ("mean absolute gradient", "high-frequency residual", "contrast")
IMAGE_PASSES = 9
"""Times that image features touch each value of an image."""
LAYER_FEATURES = ("mean of the input", "deviation of the input")
SIDE = 4
"""Rows and columns of a map that a layer's features look at: 16 positions in all channels, below 0.1 % of a convolution's work."""


def image_features(images: Tensor) -> Tensor:
    """Return (n, 3) of normalized images (n, c, h, w): IMAGE_FEATURES, over all channels and pixels.

    The residual is the deviation of what a 3x3 box filter takes away; contrast is the deviation of the values.
    """
    across, down = images.diff(dim=3).abs().mean((1, 2, 3)), images.diff(dim=2).abs().mean((1, 2, 3))
    smooth = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.stack(
        [(across + down) / 2, (images - smooth).flatten(1).std(1, correction=0), images.flatten(1).std(1, correction=0)], dim=1
    )


def layer_features(x: Tensor, channels: int = 1) -> Tensor:
    """Return (n, 2) of a layer's input: LAYER_FEATURES, over all channels and up to SIDE positions of every other axis; detached.

    x: (n, c, ...) for a convolution; (n, ..., c) for a linear layer, with `channels` -1: the axis of the channels.
    """
    seen = x.detach()
    for axis in range(1, x.ndim):
        if axis != channels % x.ndim:
            seen = seen[(slice(None),) * axis + (slice(None, None, -(-x.shape[axis] // SIDE)),)]
    flat = seen.flatten(1).float()
    return torch.stack([flat.mean(1), flat.std(1, correction=0)], dim=1)
