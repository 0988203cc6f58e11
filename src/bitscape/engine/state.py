"""All that changes while a run goes on, to and from a checkpoint's tensors and header."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.engine.checkpoint import check_same_settings, check_same_tensors, load_checkpoint, restoring, save_checkpoint
from bitscape.engine.ema import Ema
from bitscape.engine.rates import Rates
from bitscape.engine.step import Step, StepRecord, restore_step, step_state
from bitscape.engine.task import Task
from bitscape.engine.trees import packed, unpacked
from bitscape.errors import BitscapeError
from bitscape.models.find import load_state

_log = logging.getLogger("bitscape.engine")

_COUNTS = ("epoch", "batch", "steps", "images")
_OF_MACHINE = ("params", "fused", "foreach", "capturable")
"""Entries of an optimizer's groups that belong to this process, not to the run."""


@dataclass(kw_only=True)
class RunState:
    """A run between two batches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rates: Rates
    step: Step
    task: Task
    ema: Ema | None
    settings: Mapping[str, Any]
    device: torch.device
    start: str = ""
    """Hash of the weights with which the run began."""
    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches finished of the epoch under way."""
    steps: int = 0
    """Batches finished, over all epochs."""
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
        self._sum("metric", record.sums)
        self._sum("gradient_norm", gradient_norm * images)
        for name, value in record.extras.items():
            self._sum(f"extra.{name}", value.detach() * images)
            self._sum(f"images.{name}", torch.full_like(value, images, dtype=torch.float64))
        self.batch += 1
        self.steps += 1
        self.images += images

    def means(self) -> dict[str, float]:
        """Return the epoch's means so far: loss, the task's metric (top1 in %), gradient_norm, the step's extras. Waits for the GPU."""
        if not self.sums:
            return {}
        sums = {name: value.cpu() for name, value in self.sums.items()}
        extras = {name.removeprefix("extra."): float(total) for name, total in sums.items() if name.startswith("extra.")}
        metric = self.task.metric
        measured = metric.numbers(sums["metric"])
        return {
            "loss": float(sums["loss"]) / self.images,
            **({metric.name: measured[metric.name]} if metric.name in measured else {}),
            "gradient_norm": float(sums["gradient_norm"]) / self.images,
            **{name: total / float(sums[f"images.{name}"]) for name, total in extras.items()},
        }

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """Close the epoch with its record."""
        self.records.append(record)
        self.epoch, self.batch, self.images, self.sums = self.epoch + 1, 0, 0, {}

    def save(self, path: Path) -> None:
        """Write a checkpoint from which the run goes on bit for bit."""
        of_optimizer, optimizer = packed(self.optimizer.state_dict(), "optimizer")
        of_rates, rates = packed(self.rates.state(), "rates")
        tensors = {
            **_named("model", tensors_of(self.model)),
            **of_optimizer,
            **of_rates,
            **_named("step", step_state(self.step)),
            **_named("sum", self.sums),
            **_named("ema", self.ema.values if self.ema else {}),
            "rng.cpu": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        counts = {name: getattr(self, name) for name in (*_COUNTS, "train_s")}
        plain = {"optimizer": optimizer, "rates": rates}
        about = {"settings": self.settings, "start": self.start, "records": self.records}
        save_checkpoint(path, tensors, {**about, **plain, **counts})

    def restore(self, path: Path) -> None:
        """Become the state in the checkpoint; CheckpointError, and nothing changed, if it is of another run."""
        tensors, header = load_checkpoint(path)
        with restoring(path):
            check_same_tensors(path, _part("model", tensors), tensors_of(self.model), "model")
            check_same_settings(path, header["settings"], self.settings)
            _check_counts(header)
            if header.get("start", self.start) != self.start:
                _log.warning(
                    "%s: its run began with other weights than the network has now; these are replaced by those of the "
                    "checkpoint. For a run of their own give another folder, or resume=False",
                    path,
                )
                self.start = header["start"]
            self._take(tensors, header)

    def _take(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        load_state(self.model, _part("model", tensors))
        self.rates.restore(unpacked(header["rates"], tensors))
        self._restore_optimizer(unpacked(header["optimizer"], tensors))
        if self.ema:
            self.ema.values = {name: value.to(self.device) for name, value in _part("ema", tensors).items()}
        restore_step(self.step, _part("step", tensors))
        self.sums = {name: value.to(self.device) for name, value in _part("sum", tensors).items()}
        self.records = header["records"]
        self.epoch, self.batch, self.steps, self.images = (header[name] for name in _COUNTS)
        self.train_s = header["train_s"]
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()

    def _restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Not by `load_state_dict`, which changes types and memory formats."""
        groups = self.optimizer.param_groups
        for group, saved in zip(groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name not in _OF_MACHINE})
        parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer.state.clear()
        for number, values in state["state"].items():
            parameter = parameters[number]
            self.optimizer.state[parameter] = {
                key: self._like(parameter, key, value) if isinstance(value, Tensor) else value for key, value in values.items()
            }

    def _like(self, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
        if key == "step" or value.shape != parameter.shape:  # counts are on the device only where the kernel is fused
            on_device = value.ndim or self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
            return value.to(parameter.device if on_device else "cpu")
        # The parameter's memory format: fused kernels walk both in memory order.
        return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _check_counts(header: Mapping[str, Any]) -> None:
    counts, records = [header[name] for name in _COUNTS], header["records"]
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
