"""Networks that several tests share: those of published figures, whose shapes count, and small ones of several inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), the last relu optional."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, relu: bool = True) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    same = stride == 1 and inputs == outputs
    return nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    body = [*conv_norm(inputs, width, 3, stride), nn.ReLU(), *conv_norm(width, width, 3)]
    return Residual(nn.Sequential(*body), _shortcut(inputs, width, stride))


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    body = [*conv_norm(inputs, width, 1), nn.ReLU(), *conv_norm(width, width, 3, stride), nn.ReLU()]
    body += conv_norm(width, 4 * width, 1)
    return Residual(nn.Sequential(*body), _shortcut(inputs, 4 * width, stride))


def _head(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def resnet18() -> nn.Module:
    return _imagenet_resnet(basic_block, (2, 2, 2, 2), expansion=1)


def resnet50() -> nn.Module:
    return _imagenet_resnet(bottleneck, (3, 4, 6, 3), expansion=4)


def _imagenet_resnet(block, depths: tuple[int, ...], expansion: int) -> nn.Module:
    layers: list[nn.Module] = [*conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layers.append(block(inputs, 64 * 2**stage, stride=2 if stage and not index else 1))
            inputs = 64 * 2**stage * expansion
    return nn.Sequential(*layers, *_head(inputs, 1000))


def resnet20(classes: int = 100) -> nn.Module:
    """The CIFAR network with convolutions in its shortcuts."""
    layers: list[nn.Module] = [*conv_norm(3, 16, 3), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for index in range(3):
            layers.append(basic_block(inputs, width, stride=2 if width != 16 and not index else 1))
            inputs = width
    return nn.Sequential(*layers, *_head(inputs, classes))


def inverted_residual(inputs: int, outputs: int, expand: int, stride: int) -> nn.Module:
    hidden = inputs * expand
    body: list[nn.Module] = [*conv_norm(inputs, hidden, 1), nn.ReLU6()] if expand > 1 else []
    body += [*conv_norm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), *conv_norm(hidden, outputs, 1)]
    same = stride == 1 and inputs == outputs
    return Residual(nn.Sequential(*body), nn.Identity(), relu=False) if same else nn.Sequential(*body)


def mobilenetv2() -> nn.Module:
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    layers: list[nn.Module] = [*conv_norm(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for expand, outputs, depth, stride in stages:
        for index in range(depth):
            layers.append(inverted_residual(inputs, outputs, expand, stride if not index else 1))
            inputs = outputs
    return nn.Sequential(*layers, *conv_norm(inputs, 1280, 1), nn.ReLU6(), *_head(1280, 1000))


class TwoImages(nn.Module):
    """Two images, joined at their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_norm(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), *_head(8, 5))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.body(torch.cat([left, right], 1))


class ImageAndVector(nn.Module):
    """An image and a vector of three features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.features = nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU()), nn.Linear(3, 8)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        pooled = self.conv(image).mean((2, 3))
        return self.head(torch.cat([pooled, self.features(features).relu()], 1))


class DictOutput(nn.Module):
    """Two heads of different shape, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.body(pixels)
        return {"boxes": self.boxes(features), "scores": self.scores(features.mean((2, 3)))}


class NestedInput(nn.Module):
    """An image, and a pair of an image and a scale that is the same for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.head = nn.Sequential(nn.ReLU(), *_head(8, 5))

    def forward(self, image: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
        features = self.first(image) + self.second(pair[0]) * pair[1]
        return self.head(features), [features]


class ImageAndIndex(nn.Module):
    """An image, the number of its camera, and which rows of it count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.camera = nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU()), nn.Embedding(4, 8)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor, camera: Tensor, rows: Tensor) -> Tensor:
        image = torch.where(rows[:, None, :, None], image, torch.zeros_like(image))
        return self.head(torch.cat([self.conv(image).mean((2, 3)), self.camera(camera)], 1))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Called:
    """A small network, what it is called with for so many samples, and the names of both ends in a file."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def network(self) -> nn.Module:
        """The network, the same every time, in eval mode, its norms' statistics neither zero nor one."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = self.build().eval()
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
        return network


CALLED = {
    "two images": Called(TwoImages, lambda n: (drawn(n, 3, 8, 8), drawn(n, 3, 8, 8, seed=1)), ("left", "right"), ("output0",)),
    "keywords": Called(
        ImageAndVector,
        lambda n: {"features": drawn(n, 3), "image": drawn(n, 3, 8, 8)},
        ("image", "features"),
        ("output0",),
    ),
    "dict output": Called(DictOutput, lambda n: drawn(n, 3, 8, 8), ("pixels",), ("boxes", "scores")),
    "nested input": Called(
        NestedInput,
        lambda n: (drawn(n, 3, 8, 8), (drawn(n, 3, 8, 8, seed=1), torch.tensor([[[0.5]]] * 8))),
        ("image", "pair.0", "pair.1"),
        ("output0", "output1.0"),
    ),
    "indices and mask": Called(
        ImageAndIndex,
        lambda n: (drawn(n, 3, 8, 8), torch.arange(n) % 4, torch.arange(n * 8).reshape(n, 8) % 3 > 0),
        ("image", "camera", "rows"),
        ("output0",),
    ),
}
"""Networks of several inputs and outputs of every form."""
