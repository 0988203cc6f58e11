"""Two small networks of other tasks on CIFAR images, and how they are trained: plain PyTorch, minutes on one core.

`RotationRegressor` tells by how many degrees an image was turned (one number). `SameClass` tells whether two images show
the same class (two inputs, one logit); both go through one shared body.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_DEGREES = 45.0
Batch = tuple[tuple[Tensor, ...], Tensor]
"""Inputs and target."""


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two convolutions beside a shortcut of 1x1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = _conv(inputs, outputs, 2), _conv(outputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, outputs, h / 2, w / 2)."""
        return functional.relu(self.second(functional.relu(self.first(x))) + self.shortcut(x))


def body(outputs: int) -> nn.Sequential:
    """A small residual network of 10 million MACs: (n, 3, 32, 32) -> (n, outputs)."""
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, outputs)
    return nn.Sequential(_conv(3, 16), nn.ReLU(), Block(16, 32), Block(32, 64), Block(64, 96), *ends)


class RotationRegressor(nn.Module):
    """One output, in units of MOST_DEGREES."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(1)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, 32, 32) -> (n, 1)."""
        angles: Tensor = self.body(images)
        return angles


class SameClass(nn.Module):
    """One body for both images; their features' absolute difference gives the logit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(64)
        self.head = nn.Linear(64, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Twice (n, 3, 32, 32) -> (n, 1)."""
        logit: Tensor = self.head((self.body(left).relu() - self.body(right).relu()).abs())
        return logit


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each of `images` (n, c, h, w) by its `degrees` (n,) around the centre, and keep a disk of the image."""
    angle = degrees * math.pi / 180
    zeros = torch.zeros_like(angle)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, zeros], 1), torch.stack([sin, cos, zeros], 1)], 1)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    disk = grid.square().sum(-1) <= 1  # corners would tell the angle
    return functional.grid_sample(images, grid, align_corners=False) * disk[:, None]


def rotation_batch(images: Tensor, _: Tensor, generator: torch.Generator) -> Batch:
    """Turn images by drawn angles."""
    share = 2 * torch.rand(len(images), generator=generator) - 1
    return (turned(images, MOST_DEGREES * share),), share[:, None]


def pair_batch(images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
    """Pair each image with another, of its own class for about half of them."""
    order = torch.randperm(len(images), generator=generator)
    partner = order.clone()
    for row in torch.nonzero(torch.rand(len(images), generator=generator) < 0.5)[:, 0].tolist():
        alike = torch.nonzero(labels == labels[row])[:, 0]
        partner[row] = alike[int(torch.randint(len(alike), (1,), generator=generator))]
    return (images, images[partner]), (labels == labels[partner]).float()[:, None]


def train_own(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    make_batch: Callable[[Tensor, Tensor, torch.Generator], Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    seed: int = 0,
) -> nn.Module:
    """Train `network` in place on normalized `images` and return it in eval mode: Adam, one cycle, batches of 128."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // 128 * 128].split(128):
            inputs, target = make_batch(images[rows], labels[rows], generator)
            optimizer.zero_grad()
            loss(network(*inputs), target).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    return network
