"""The loop: epochs of batches through a step, with schedule, averages, checkpoints and records."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitscape.engine import workers
from bitscape.engine.describe import versions
from bitscape.engine.evaluate import evaluate
from bitscape.engine.feed import feed
from bitscape.engine.forward import autocast_on
from bitscape.engine.nonfinite import NonFiniteError, diagnose
from bitscape.engine.pace import Pace
from bitscape.engine.settings import Cosine
from bitscape.engine.state import RunState
from bitscape.engine.step import LossFunction
from bitscape.errors import BitscapeError, explained_forward
from bitscape.files import write_atomic

if TYPE_CHECKING:
    from bitscape.data.batches import Batches

_log = logging.getLogger("bitscape.engine")
CHECKPOINT, METRICS, RUN = "checkpoint.safetensors", "metrics.jsonl", "run.json"


@dataclass(kw_only=True)
class Loop:
    """A run: its state, and the parts that do not change."""

    state: RunState
    batches: "Batches"
    validation: "Batches | None"
    epochs: int
    schedule: Cosine
    loss: LossFunction
    autocast: torch.dtype | None
    channels_last: bool
    clip_norm: float | None
    folder: Path | None
    checkpoint_every_s: float
    after_epoch: Callable[[int], Mapping[str, float]] | None
    first_bad: Tensor = field(init=False)
    """Batch of this epoch whose loss or gradient was not finite first, -1 = none; read as seldom as possible."""
    base_lrs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.first_bad = torch.full((), -1, device=self.state.device)
        self.base_lrs = [group["lr"] for group in self.state.optimizer.param_groups]

    def open(self, resume: bool) -> None:
        """Prepare the folder; go on from its checkpoint."""
        if self.folder is None:
            workers.same_start(self.state.model)
            return
        if workers.is_first():
            self._tidy(self.folder, resume)
        workers.wait()
        checkpoint = self.folder / CHECKPOINT
        if checkpoint.exists():
            self.state.restore(checkpoint)
            _log.info("resuming %s at epoch %d, batch %d", checkpoint, self.state.epoch + 1, self.state.batch)
        workers.same_start(self.state.model)
        about = {"format": 1, "settings": self.state.settings, "versions": versions(), "device": str(self.state.device)}
        about["workers"] = workers.world_size()
        if workers.is_first():
            write_atomic(self.folder / RUN, json.dumps(about, indent=2) + "\n")
            self._write_metrics()

    def _tidy(self, folder: Path, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, METRICS, RUN):
            for leftover in folder.glob(f".{name}.*.tmp"):  # of a run killed while it wrote
                leftover.unlink(missing_ok=True)
        if not resume:
            (folder / CHECKPOINT).unlink(missing_ok=True)

    def run(self) -> None:
        """Run the epochs that are left."""
        state, pace = self.state, Pace()
        while state.epoch < self.epochs:
            state.model.train()
            self._run_epoch(pace)
            self._stop_if_bad()
            workers.average_buffers(state.model)
            state.train_s += pace.lap()
            record = self._record()
            if self.after_epoch is not None:
                record |= self.after_epoch(state.epoch + 1)
            state.finish_epoch(record)
            self._save()
            pace.go_on(saved=True)

    def _run_epoch(self, pace: Pace) -> None:
        for images, labels in self._feed(self.state.batch):
            self._run_batch(images, labels)
            pace.count_step()
            if pace.report_due():
                self._stop_if_bad()
                self.state.train_s += pace.lap()
                self._report(pace.step_s())
            if self.folder is not None and workers.decided_by_first(pace.save_due(self.checkpoint_every_s), self.state.device):
                self._stop_if_bad()
                workers.average_buffers(self.state.model)
                self.state.train_s += pace.lap()
                self._save()
                pace.go_on(saved=True)

    def _feed(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        state = self.state
        return feed(self.batches, state.epoch, start=start, device=state.device, channels_last=self.channels_last)

    def _report(self, step_s: float) -> None:
        if not workers.is_first():
            return
        state, per_epoch = self.state, len(self.batches)
        left_s = (self.epochs * per_epoch - self._steps_done()) * step_s
        _log.info(
            "epoch %d/%d, batch %d/%d: loss %.4f, %.0f images/s, %.0f s left",
            *(state.epoch + 1, self.epochs, state.batch, per_epoch),
            *(state.means()["loss"], state.images / state.batch / step_s, left_s),
        )

    def _run_batch(self, images: Tensor, labels: Tensor) -> None:
        state = self.state
        self._set_rates()
        state.optimizer.zero_grad(set_to_none=True)
        with autocast_on(state.device, self.autocast), explained_forward(images):  # a teacher may fail on them
            loss = self.loss.for_batch(images)
        record = state.step(state.model, images, labels, loss)
        workers.average_gradients(workers.trainable(state.optimizer.param_groups), len(images))
        record, seen = workers.pooled(record, len(images))
        norm = self._clip()
        self._flag(record.loss.isfinite() & norm.isfinite())
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(state.model, self._steps_done())
        state.add(record, norm, seen)

    def _set_rates(self) -> None:
        per_epoch = len(self.batches)
        factor = self.schedule.factor(self._steps_done(), steps=self.epochs * per_epoch, steps_per_epoch=per_epoch)
        for group, base in zip(self.state.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def _steps_done(self) -> int:
        return self.state.epoch * len(self.batches) + self.state.batch

    def _clip(self) -> Tensor:
        updated = [p for group in self.state.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not updated:
            raise BitscapeError("the step left no gradient in any trainable parameter; it must call loss.backward()")
        norm = torch.nn.utils.get_total_norm([p.grad for p in updated])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(updated, self.clip_norm, norm)
        return norm

    def _flag(self, good: Tensor) -> None:
        """Note a bad batch before its update: the CPU stops at once, fused CUDA kernels skip all updates from it on."""
        fresh = ~good & (self.first_bad < 0)
        self.first_bad = torch.where(fresh, self.state.batch, self.first_bad)
        if self.state.device.type == "cuda":
            self.state.optimizer.found_inf = (self.first_bad >= 0).float()  # type: ignore[attr-defined]
        else:
            self._stop_if_bad()

    def _stop_if_bad(self) -> None:
        batch = int(self.first_bad)
        if batch < 0:
            return
        state = self.state
        images, _ = next(self._feed(batch))
        saved = None if self.folder is None else self.folder / CHECKPOINT
        raise NonFiniteError(
            f"loss or gradient is not finite at epoch {state.epoch + 1} of {self.epochs}, batch {batch} (from 0): "
            f"{diagnose(state.model, images)}; the update was not made{_but_statistics(state.model)}. "
            f"Last good checkpoint: {saved if saved is not None and saved.exists() else 'none'}. "
            "Try a smaller lr, a warm-up, clip_norm=1.0, or autocast=None"
        )

    def _record(self) -> dict[str, Any]:
        state = self.state
        rate = state.optimizer.param_groups[0]["lr"]
        record = {"epoch": state.epoch + 1, **state.means(), "lr": rate, "images": state.images}
        record["train_s"] = round(state.train_s, 3)
        if self.validation is not None:
            record |= self._validate("validation_")
            if state.ema is not None:
                with state.ema.applied(state.model):
                    record |= self._validate("ema_validation_")
        if workers.is_first():
            _log.info("epoch %d/%d: %s", record["epoch"], self.epochs, _in_words(record))
        return record

    def _validate(self, prefix: str) -> dict[str, float]:
        assert self.validation is not None
        accuracy = evaluate(self.state.model, self.validation)
        return {f"{prefix}top1": accuracy.top1, f"{prefix}top5": accuracy.top5, f"{prefix}loss": accuracy.loss}

    def _save(self) -> None:
        if self.folder is not None and workers.is_first():
            self.state.save(self.folder / CHECKPOINT)
            self._write_metrics()

    def _write_metrics(self) -> None:
        assert self.folder is not None
        write_atomic(self.folder / METRICS, "".join(json.dumps(record) + "\n" for record in self.state.records))


def _but_statistics(model: nn.Module) -> str:
    if not any(True for _ in model.buffers()):
        return ""
    return ", but the model in memory is not usable: its norm statistics have taken that batch in"


def _in_words(record: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in record.items() if name not in ("epoch", "images")}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
