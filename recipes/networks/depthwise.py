"""A depthwise network of our own for CIFAR images.

Its blocks are the inverted residuals of MobileNetV2 (Sandler et al., arXiv 1801.04381). It has
82,608 weights of convolutions and classifier, 8 % of them depthwise, and 8.5 million MACs on a
32x32 image.
"""

from collections import OrderedDict

from torch import Tensor, nn

EXPANSION = 4
"""Channels of the depthwise convolution over those that come in."""
BLOCKS = ((24, 2), (24, 1), (32, 2), (32, 1), (64, 1), (64, 1))
"""Output channels and stride of each block."""


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> OrderedDict[str, nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return OrderedDict(conv=layer, norm=nn.BatchNorm2d(outputs))


def _active(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, kernel, stride, groups) | {"relu": nn.ReLU()})


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1; add the input if shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = EXPANSION * inputs
        self.expand = _active(inputs, hidden, 1)
        self.depthwise = _active(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(_conv(hidden, outputs, 1))
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds_input else y


class Depthwise(nn.Module):
    """Stem of 16 channels, six inverted residuals, head of 128 channels, classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _active(3, 16, 3)
        inputs = (16, *(outputs for outputs, _ in BLOCKS))
        pairs = zip(inputs, BLOCKS, strict=False)
        self.blocks = nn.Sequential(*(InvertedResidual(before, *block) for before, block in pairs))
        self.head = _active(inputs[-1], 128, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> logits (n, classes)."""
        logits: Tensor = self.classifier(
            self.pool(self.head(self.blocks(self.stem(images)))).flatten(1)
        )
        return logits


def depthwise() -> nn.Module:
    """Return the network without weights."""
    return Depthwise()
