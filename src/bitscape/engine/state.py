"""All that changes while a run goes on, to and from a checkpoint's tensors and header."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.engine.checkpoint import check_same_settings, check_same_tensors, load_checkpoint, restoring, save_checkpoint
from bitscape.engine.ema import Ema
from bitscape.engine.step import Step, StepRecord, restore_step, step_state
from bitscape.errors import BitscapeError
from bitscape.models.find import load_state


@dataclass(kw_only=True)
class RunState:
    """A run between two batches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    ema: Ema | None
    settings: Mapping[str, Any]
    device: torch.device
    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches finished of the epoch under way."""
    images: int = 0
    """Images seen in the epoch under way."""
    train_s: float = 0.0
    """Seconds of wall clock spent in training steps, over all epochs."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the epoch under way, on the device in float64."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """One record for each finished epoch."""

    def add(self, record: StepRecord, gradient_norm: Tensor, images: int) -> None:
        """Count one finished batch of `images`."""
        self._sum("loss", record.loss * images)
        self._sum("correct", record.correct)
        self._sum("gradient_norm", gradient_norm * images)
        for name, value in record.extras.items():
            self._sum(f"extra.{name}", value.detach() * images)
            self._sum(f"images.{name}", torch.full_like(value, images, dtype=torch.float64))
        self.batch += 1
        self.images += images

    def means(self) -> dict[str, float]:
        """Return the epoch's means so far: loss, top1 (%), gradient_norm, the step's extras. Waits for the GPU."""
        if not self.sums:
            return {}
        sums = dict(zip(self.sums, torch.stack([value.to(self.device) for value in self.sums.values()]).tolist(), strict=True))
        extras = {name.removeprefix("extra."): total for name, total in sums.items() if name.startswith("extra.")}
        return {
            "loss": sums["loss"] / self.images,
            "top1": 100 * sums["correct"] / self.images,
            "gradient_norm": sums["gradient_norm"] / self.images,
            **{name: total / sums[f"images.{name}"] for name, total in extras.items()},
        }

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """Close the epoch with its record."""
        self.records.append(record)
        self.epoch, self.batch, self.images, self.sums = self.epoch + 1, 0, 0, {}

    def save(self, path: Path) -> None:
        """Write a checkpoint from which the run goes on bit for bit."""
        tensors = {
            **_named("model", tensors_of(self.model)),
            **_named("optimizer", dict(self._optimizer_tensors())),
            **_named("step", step_state(self.step)),
            **_named("sum", self.sums),
            **_named("ema", self.ema.values if self.ema else {}),
            "rng.cpu": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        counts = {"epoch": self.epoch, "batch": self.batch, "images": self.images, "train_s": self.train_s}
        save_checkpoint(path, tensors, {"settings": self.settings, "records": self.records, **counts})

    def restore(self, path: Path) -> None:
        """Become the state in the checkpoint; CheckpointError, and nothing changed, if it is of another run."""
        tensors, header = load_checkpoint(path)
        with restoring(path):
            check_same_tensors(path, _part("model", tensors), tensors_of(self.model), "model")
            check_same_settings(path, header["settings"], self.settings)
            _check_counts(header)
            self._take(tensors, header)

    def _take(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        load_state(self.model, _part("model", tensors))
        self._restore_optimizer(_part("optimizer", tensors))
        if self.ema:
            self.ema.values = {name: value.to(self.device) for name, value in _part("ema", tensors).items()}
        restore_step(self.step, _part("step", tensors))
        self.sums = {name: value.to(self.device) for name, value in _part("sum", tensors).items()}
        self.records = header["records"]
        self.epoch, self.batch, self.images = header["epoch"], header["batch"], header["images"]
        self.train_s = header["train_s"]
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):  # SGD keeps None where a parameter had no gradient yet
                    yield f"{name}.{key}", value

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for full_name, value in tensors.items():
            name, key = full_name.rsplit(".", 1)
            self.optimizer.state[parameters[name]][key] = self._like(parameters[name], key, value)

    def _like(self, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
        if key == "step" or value.shape != parameter.shape:  # counts are on the device only where the kernel is fused
            return value.to(parameter.device if value.ndim or self.optimizer.defaults.get("fused") else "cpu")
        # The parameter's memory format: fused kernels walk both in memory order.
        return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _check_counts(header: Mapping[str, Any]) -> None:
    counts, records = [header[name] for name in ("epoch", "batch", "images")], header["records"]
    if not all(type(count) is int and count >= 0 for count in counts) or type(header["train_s"]) not in (int, float):
        raise ValueError("its counts are no whole numbers from 0")
    if not isinstance(records, list) or len(records) != header["epoch"] or not all(isinstance(record, dict) for record in records):
        raise ValueError("it does not have one record for each epoch")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state dict; BitscapeError if it holds anything that a checkpoint cannot store."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise BitscapeError(f"model state {name!r} is {type(value).__name__}; only tensors can be stored")
    return state


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
