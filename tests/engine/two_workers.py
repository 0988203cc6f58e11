"""What tests run alone and under torchrun, to compare: prints one JSON object per worker."""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import bitscape as bs
from bitscape.data.batches import UNIT, Batches
from bitscape.data.samples import Samples
from bitscape.data.sources import Dataset
from bitscape.engine import Batch, NonFiniteError, Sgd, StepRecord, evaluate, train
from bitscape.engine.pace import Pace
from bitscape.engine.workers import rank
from bitscape.errors import BitscapeError
from bitscape.models.layers import quantizable_layers
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.searches.asga import Asga
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.problem import SearchProblem
from bitscape.searches.seam import Seam
from bitscape.sharpness import Ball
from bitscape.steps import Saq

SHARP = Saq(rho=0.02, interval=3, reuse="orthogonal")


class TwoPasses:
    """A sharpness-aware step: each worker moves along its own gradient."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        with Ball().watched(model) as ascent:
            record = batch.backward(model)
        model.zero_grad(set_to_none=True)
        with ascent.applied(ascent.factor(0.1)):
            batch.backward(model)
        return replace(record, extras={"norm": ascent.norm})


class OnePass:
    """The ordinary step; on one worker its loss may be made infinite."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        if rank() == self.broken:
            batch = replace(batch, parts=tuple(replace(part, share=torch.inf) for part in batch.parts))
        return batch.backward(model)


class PartlyFrozen(OnePass):
    """Leaves no gradient in the first layer, and none on the first worker in the second."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        record = super().__call__(model, batch)
        model[0].zero_grad()
        if rank() == 0:
            model[3].zero_grad()
        return record


def network(*, norm: bool = False, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    body = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.Dropout(0.2) if norm else nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.ReLU(),
    ]
    return nn.Sequential(*body, nn.Conv2d(12, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def batches() -> Batches:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (41, 3, 8, 8), dtype=torch.uint8, generator=generator)
    data = Dataset("drawn", images, torch.randint(0, 5, (41,), generator=generator), tuple("abcde"))
    return Batches(dataset=data, normalization=UNIT, batch_size=16, shuffle=True, augment="flip")  # 16, 16 and 9 images


def trained(step: Any, *, norm: bool = False, bits: int | None = None, folder: Path | None = None) -> dict[str, Any]:
    model = network(norm=norm, seed=3 + rank())  # all start from the first one's
    if bits is not None:
        layers = dict.fromkeys(quantizable_layers(model), LayerBits(bits, bits))
        calibrate(with_quantizers(model, Policy(layers)), torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    model.register_buffer("constant", torch.tensor([0.1, torch.inf, -torch.inf]))
    hooked: list[int] = []

    def after_epoch(epochs: int) -> dict[str, float]:
        hooked.append(epochs)
        return {"hooked": epochs}

    result = train(
        model,
        batches(),
        step=step,
        optimizer=Sgd(lr=0.1),
        epochs=2,
        folder=folder,
        checkpoint_every_s=0.0,
        ema_decay=0.9,
        validation=batches(),
        after_epoch=after_epoch,
    )
    assert torch.equal(model.constant, torch.tensor([0.1, torch.inf, -torch.inf]))
    assert result.ema is not None
    records = [{name: value for name, value in record.items() if name != "train_s"} for record in result.records]
    return {"weights": listed(model.state_dict()), "ema": listed(result.ema), "records": records, "hooked": hooked}


def listed(state: Any) -> list[float]:
    return [value for name, tensor in sorted(state.items()) if name != "constant" for value in tensor.double().flatten().tolist()]


def loaded() -> dict[str, Any]:
    """A loader that shuffles rows of noise, a loss and an optimizer of the user's, and data without batches to validate on."""

    class Noisy(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
        def __len__(self) -> int:
            return 41

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((3, 8, 8), row / 41) + torch.rand(3, 8, 8), torch.full((5,), row / 41)

    def square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).square().mean(1)

    model = network(seed=3 + rank())
    result = bs.train(
        model,
        torch.utils.data.DataLoader(Noisy(), batch_size=16, shuffle=True),
        epochs=2,
        loss=square,
        metric=square,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        validation=(torch.ones(9, 3, 8, 8), torch.zeros(9, 5)),
        batch_size=None,
    )
    records = [{name: value for name, value in record.items() if name != "train_s"} for record in result.records]
    return {"weights": listed(model.state_dict()), "records": records}


def shared_by_the_loader() -> str:
    """What is said of a loader that gives each worker other rows by itself."""
    rows = torch.utils.data.TensorDataset(torch.ones(40, 3, 8, 8), torch.zeros(40, dtype=torch.int64))
    sampler = torch.utils.data.DistributedSampler(rows, num_replicas=2, rank=rank())
    try:
        bs.train(network(), torch.utils.data.DataLoader(rows, batch_size=8, sampler=sampler), epochs=1)
    except BitscapeError as error:
        return str(error)
    return "finished"


def searched(method: Any) -> dict[str, Any]:
    images = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 5, (48,), generator=torch.Generator().manual_seed(2))
    result = method.search(SearchProblem.of(model=network().eval(), samples=Samples.of(images, labels), budget="bitops=w3a3"))
    return {"policy": {name: str(bits) for name, bits in result.policy.layers.items()}, "scores": result.scores.values.tolist()}


class Stop(Exception):
    """What ends a run in the middle."""


def continued(step: Any, folder: Path, **network: Any) -> dict[str, Any]:
    """A run that stops when its fifth batch is done and the fourth is stored, and goes on from there."""
    with contextlib.suppress(Stop), patch.object(Pace, "count_step", side_effect=[None] * 4 + [Stop]):
        trained(step, folder=folder, **network)
    assert (folder / "checkpoint.safetensors").exists()
    if rank() == 0:
        shutil.copytree(folder, folder.with_name(f"half of {folder.name}"))
    return trained(step, folder=folder, **network)


def accuracy() -> list[float]:
    data = batches()
    # 9 images in batches of 4, 4 and 1: the last has none for the second worker
    few = Batches(dataset=data.dataset.subset(slice(9)), normalization=UNIT, batch_size=4, fewest=1)
    found = [evaluate(network(), each, together=True) for each in (data, few)]
    return [value for each in found for value in (each.top1, each.top5, each.loss, each.images)]


def parts() -> list[int]:
    """Into how many parts each batch is cut where more are asked for than a worker may have images."""
    seen: list[int] = []

    def step(model: nn.Module, batch: Batch) -> StepRecord:
        seen.append(len(batch.parts))
        return batch.backward(model)

    train(network(), batches(), step=step, optimizer=Sgd(), epochs=1, accumulate=5)
    return seen


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
        "partly frozen": trained(PartlyFrozen()),
        "accuracy": accuracy(),
        "in one go": trained(OnePass(), norm=True, folder=folder / "whole"),
        "continued": continued(OnePass(), folder / "again", norm=True),
        "sharp": trained(SHARP, bits=4),
        "sharp continued": continued(SHARP, folder / "sharp", bits=4),
        "differentiable": searched(Differentiable(epochs=2, batch_size=16, task="labels")),
        "held out": searched(Differentiable(epochs=2, batch_size=16, task="new-head", held_out=0.5)),
        "seam": searched(Seam(epochs=2, batch_size=16, task="labels")),
        "asga": searched(Asga(epochs=2, batch_size=16, task="labels")),
        "loaded": loaded(),
        "shared by the loader": shared_by_the_loader(),
        "parts": parts(),
        "broken": broken(),
    }
    (folder / f"worker{rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
