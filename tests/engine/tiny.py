"""A small task for the loop's tests: noisy class patterns, and a network with everything a checkpoint must hold."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Images:
    name: str
    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class TinyBatches:
    """What the loop uses of `bitscape.data.batches.Batches`, with float images."""

    dataset: Images
    batch_size: int = 16
    seed: int = 0

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(1000 * self.seed + number))
        for rows in order.split(self.batch_size)[start:]:
            labels = self.dataset.labels
            yield self.dataset.images[rows], None if labels is None else labels[rows]


def tiny_batches(images: int = 70, classes: int = 3, seed: int = 0) -> TinyBatches:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    noise = torch.randn(images, 2, 6, 6, generator=generator)
    noise += torch.arange(classes)[labels, None, None, None]
    return TinyBatches(dataset=Images(name="tiny", images=noise, labels=labels))


class ScaleQuantizer(nn.Module):
    """Stands for a fake quantizer: one learned number."""

    is_fake_quantizer = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def tiny_net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            ScaleQuantizer(),
            nn.Conv2d(4, 4, 3),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(16, classes),
        )


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
