"""What tests run alone and under torchrun, to compare: prints one JSON object per worker."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.data.batches import UNIT, Batches
from bitscape.data.sources import Dataset
from bitscape.engine import BatchLoss, NonFiniteError, Sgd, StepRecord, train
from bitscape.engine.step import count_correct
from bitscape.engine.workers import rank
from bitscape.search.asga import Asga
from bitscape.search.differentiable import Differentiable
from bitscape.search.problem import SearchProblem
from bitscape.search.seam import Seam
from bitscape.sharpness import Ball


class TwoPasses:
    """A sharpness-aware step: each worker moves along its own gradient."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: BatchLoss) -> StepRecord:
        with Ball().watched(model) as ascent:
            logits = model(images)
            value = loss(logits, labels)
            value.backward()
        model.zero_grad(set_to_none=True)
        with ascent.applied(ascent.factor(0.1)):
            loss(model(images), labels).backward()
        return StepRecord(loss=value.detach(), correct=count_correct(logits, labels), extras={"norm": ascent.norm})


class OnePass:
    """The ordinary step; on one worker its loss may be made infinite."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: BatchLoss) -> StepRecord:
        logits = model(images)
        value = loss(logits, labels) * (torch.inf if rank() == self.broken else 1.0)
        value.backward()
        return StepRecord(loss=value.detach(), correct=count_correct(logits, labels))


def network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    body = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.ReLU(),
    ]
    return nn.Sequential(*body, nn.Conv2d(12, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def batches() -> Batches:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (41, 3, 8, 8), dtype=torch.uint8, generator=generator)
    data = Dataset("drawn", images, torch.randint(0, 5, (41,), generator=generator), tuple("abcde"))
    return Batches(dataset=data, normalization=UNIT, batch_size=16, shuffle=True, augment="flip")  # 16, 16 and 9 images


def trained(step: Any, *, norm: bool = False, folder: Path | None = None) -> dict[str, Any]:
    model = network(norm=norm)
    result = train(model, batches(), step=step, optimizer=Sgd(lr=0.1), epochs=2, folder=folder, checkpoint_every_s=0.0)
    weights = torch.cat([value.double().flatten() for value in model.state_dict().values()]).tolist()
    records = [{key: record[key] for key in ("loss", "top1", "images", "gradient_norm")} for record in result.records]
    return {"weights": weights, "records": records}


def searched(method: Any) -> dict[str, Any]:
    images = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 5, (48,), generator=torch.Generator().manual_seed(2))
    result = method.search(SearchProblem(model=network().eval(), images=images, labels=labels, budget="bitops=w3a3"))
    return {"policy": {name: str(bits) for name, bits in result.policy.layers.items()}, "scores": result.scores.values.tolist()}


class Stop(Exception):
    """What ends a run in the middle."""


class StopsAt(OnePass):
    """The ordinary step; the fifth ends the run. It is described like its base, as a checkpoint compares steps."""

    __qualname__ = "OnePass"

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: BatchLoss) -> StepRecord:
        self.steps += 1
        if self.steps == 5:
            raise Stop
        return super().__call__(model, images, labels, loss)


def continued(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(Stop):
        trained(StopsAt(), norm=True, folder=folder)
    checkpoint = folder / "checkpoint.safetensors"
    assert checkpoint.exists()
    return trained(OnePass(), norm=True, folder=folder)


def broken() -> str:
    try:
        trained(OnePass(broken=1))
    except NonFiniteError as error:
        return str(error)
    return "finished"


def main(folder: Path) -> None:
    seen = {
        "plain": trained(OnePass()),
        "two passes": trained(TwoPasses(), norm=True),
        "in one go": trained(OnePass(), norm=True, folder=folder / "whole"),
        "continued": continued(folder / "again"),
        "differentiable": searched(Differentiable(epochs=2, batch_size=16, task="labels")),
        "held out": searched(Differentiable(epochs=2, batch_size=16, task="new-head", held_out=0.5)),
        "seam": searched(Seam(epochs=2, batch_size=16, task="labels")),
        "asga": searched(Asga(epochs=2, batch_size=16, task="labels")),
        "broken": broken(),
    }
    (folder / f"worker{rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
