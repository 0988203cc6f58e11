"""The loop: epochs of batches through a step, with schedule, averages, checkpoints and records."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs
from bitscape.data.epochs import Epochs, Loaded, batches_in
from bitscape.engine import origin, workers
from bitscape.engine.describe import versions
from bitscape.engine.evaluate import measured
from bitscape.engine.feed import Fed, Feed
from bitscape.engine.forward import autocast_on
from bitscape.engine.metrics import Collected
from bitscape.engine.nonfinite import NonFiniteError, diagnose
from bitscape.engine.pace import Pace
from bitscape.engine.rates import Position, Rates
from bitscape.engine.state import RunState
from bitscape.engine.step import Batch, LossFunction, least_part, pooled
from bitscape.engine.stopping import Stop, Stopping
from bitscape.engine.trackers import Watched
from bitscape.errors import BitscapeError, explained_forward
from bitscape.files import write_atomic
from bitscape.folders import CHECKPOINT, METRICS, RUN

_log = logging.getLogger("bitscape.engine")
STOP_EVERY = 16
"""Batches between two looks of several workers at what one of them noted: a bad batch, or a signal. On a GPU a look waits for it."""


@dataclass(kw_only=True)
class Loop:
    """A run: its state, and the parts that do not change."""

    state: RunState
    feed: Feed
    validation: Epochs | None
    epochs: int
    loss: LossFunction
    autocast: torch.dtype | None
    highest_label: int
    """Of all targets so far."""
    accumulate: int
    clip_norm: float | None
    folder: Path | None
    checkpoint_every_s: float
    after_epoch: Callable[[int], Mapping[str, float]] | None
    trackers: Watched
    first_bad: Tensor = field(init=False)
    """Batch of this epoch whose loss or gradient was not finite first, -1 = none; read as seldom as possible."""
    inputs: tuple[int, Inputs] | None = field(default=None, init=False)
    """Number and inputs of the last batch."""
    stopping: Stopping = field(default_factory=Stopping, init=False)

    def __post_init__(self) -> None:
        self.first_bad = torch.full((), -1, device=self.state.device)

    def open(self, resume: bool) -> None:
        """Prepare the folder; go on from its checkpoint."""
        if self.folder is None:
            return
        if workers.is_first():
            self._tidy(self.folder, resume)
        workers.wait()
        checkpoint = self.folder / CHECKPOINT
        if self._seen_by_all(checkpoint):
            self.state.restore(checkpoint)
            if workers.is_first():
                _log.info("resuming %s at epoch %d, batch %d", checkpoint, self.state.epoch + 1, self.state.batch)
        if workers.is_first():
            write_atomic(self.folder / RUN, json.dumps(self._about(), indent=2) + "\n")
            self._write_metrics()

    def _about(self) -> dict[str, Any]:
        made_by = {"commit": origin.commit(), "command": origin.command()}
        return {
            "format": 1,
            "settings": self.state.settings,
            "versions": versions(),
            "device": str(self.state.device),
            "hardware": origin.hardware(self.state.device),
            "workers": workers.world_size(),
            **{name: value for name, value in made_by.items() if value is not None},
        }

    def _seen_by_all(self, checkpoint: Path) -> bool:
        there = torch.tensor(float(checkpoint.exists()), device=self.state.device)
        seen_by = int(workers.total(there))
        if 0 < seen_by < workers.world_size():
            raise BitscapeError(
                f"folder: {seen_by} of {workers.world_size()} workers see the checkpoint {checkpoint}; give a folder that all of them see"
            )
        return seen_by > 0

    def _tidy(self, folder: Path, resume: bool) -> None:
        for name in (CHECKPOINT, METRICS, RUN):
            for leftover in folder.glob(f".{name}.*.tmp"):  # of a run killed while it wrote: the folder is locked
                leftover.unlink(missing_ok=True)
        if not resume:
            (folder / CHECKPOINT).unlink(missing_ok=True)

    def run(self) -> None:
        """Run the epochs that are left. SIGINT and SIGTERM end the run with a checkpoint, see `Stopping`."""
        self.trackers.start(self.state.settings, tuple(self.state.records))
        try:
            with self.stopping.held_back():
                self._run_epochs(Pace())
        finally:
            self.trackers.finish()

    def _run_epochs(self, pace: Pace) -> None:
        state = self.state
        try:
            while state.epoch < self.epochs:
                state.model.train()
                self._run_epoch(pace)
                self._stop_if_bad()
                state.train_s += pace.lap()
                state.finish_epoch(self._record())
                self.trackers.epoch(state.records[-1])  # before the checkpoint: told twice rather than never
                self._save()
                pace.go_on(saved=True)
        except Stop:
            self._save()
            raise

    def _run_epoch(self, pace: Pace) -> None:
        for fed in self._fed():
            self._run_batch(fed)
            pace.count_step()
            if self._may_stop():
                self._look_up(pace)
            self._stop_if_asked(pace)

    def _fed(self) -> Iterator[Fed]:
        """The batches that are left of the epoch; where one cannot be read, those before it are kept."""
        try:
            yield from self.feed.epoch(self.state.epoch, start=self.state.batch)
        except Exception:
            self._stop_if_bad()
            self._save()
            raise

    def _may_stop(self) -> bool:
        """Several workers on GPUs stop for a bad batch at the same ones only, whatever their clocks say: who is left waits forever."""
        if workers.world_size() == 1 or self.state.device.type == "cpu":
            return True
        if self.state.batch % STOP_EVERY:
            return False
        self._stop_if_bad()
        return True

    def _stop_if_asked(self, pace: Pace) -> None:
        """Several workers stop after the same batch: each may have got the signal in another one, or not at all."""
        asked = self.stopping.signal is not None
        if workers.world_size() > 1:
            if self.state.batch % STOP_EVERY:
                return
            asked = bool(workers.total(torch.tensor(float(asked), device=self.state.device)))
        if asked:
            self._stop_if_bad()
            self.state.train_s += pace.lap()
            raise Stop

    def _look_up(self, pace: Pace) -> None:
        if pace.report_due():
            self._stop_if_bad()
            self.state.train_s += pace.lap()
            self._report(pace.step_s())
        if self.folder is not None and pace.save_due(self.checkpoint_every_s):
            self._stop_if_bad()
            self.state.train_s += pace.lap()
            self._save()
            pace.go_on(saved=True)

    def _report(self, step_s: float) -> None:
        if not workers.is_first():
            return
        state, batches = self.state, self._batches
        _log.info(
            "epoch %d/%d, batch %d%s: loss %.4f, %.0f images/s%s",
            *(state.epoch + 1, self.epochs, state.batch, "" if batches is None else f"/{batches}"),
            *(state.means()["loss"], state.images / state.batch / step_s),
            "" if batches is None else f", {self._steps_left(batches) * step_s:.0f} s left",
        )

    @property
    def _batches(self) -> int | None:
        return batches_in(self.feed.batches)

    def _steps_left(self, batches: int) -> int:
        return max(0, (self.epochs - self.state.epoch) * batches - self.state.batch)

    def _position(self) -> Position:
        return Position.at(self.state.epoch, self.state.batch, epochs=self.epochs, batches=self._batches)

    def _run_batch(self, fed: Fed) -> None:
        state, position = self.state, self._position()
        inputs, samples = fed.part.inputs, len(fed.part)
        self.inputs, self.highest_label = (state.batch, inputs), max(self.highest_label, fed.highest_label)
        state.rates.before_step(position)
        workers.seed_at(state.settings["seed"], state.epoch, state.batch)
        state.optimizer.zero_grad(set_to_none=True)
        own = fed.whole // workers.world_size()  # as the worker with the fewest samples: steps may talk in each part
        parts = min(self.accumulate, max(1, own // least_part(state.model)))
        with autocast_on(state.device, self.autocast), explained_forward(inputs):  # a teacher may fail on them
            batch = Batch.of(inputs, fed.part.targets, self.loss, parts, position.step / position.steps, state.task)
        share = samples / fed.whole
        with workers.averaged_buffers(state.model, share):
            record = state.step(state.model, batch)
        workers.average_gradients(self._updated(), share)
        record = pooled(record, share)
        norm = self._clip()
        self._flag(record.loss.isfinite() & norm.isfinite())
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(state.model, state.steps)
        state.rates.after_step()
        state.add(record, norm, fed.whole)

    def _updated(self) -> list[nn.Parameter]:
        return [parameter for group in self.state.optimizer.param_groups for parameter in group["params"]]

    def _clip(self) -> Tensor:
        updated = [parameter for parameter in self._updated() if parameter.grad is not None]
        if not updated:
            raise BitscapeError("the step left no gradient in any trainable parameter; it must call loss.backward()")
        norm = torch.nn.utils.get_total_norm([p.grad for p in updated if p.grad is not None])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(updated, self.clip_norm, norm)
        return norm

    def _flag(self, good: Tensor) -> None:
        """Note a bad batch before its update: fused CUDA kernels skip all updates from it on, elsewhere the run stops at once."""
        fresh = ~good & (self.first_bad < 0)
        self.first_bad = torch.where(fresh, self.state.batch, self.first_bad)
        if self.state.device.type == "cuda" and self.state.optimizer.defaults.get("fused"):
            self.state.optimizer.found_inf = (self.first_bad >= 0).float()  # type: ignore[attr-defined]
        else:
            self._stop_if_bad()

    def _stop_if_bad(self) -> None:
        batch = int(self.first_bad)
        if batch < 0:
            return
        state = self.state
        saved = None if self.folder is None else self.folder / CHECKPOINT
        raise NonFiniteError(
            f"loss or gradient is not finite at epoch {state.epoch + 1} of {self.epochs}, batch {batch} (from 0): "
            f"{_of_worker()}{self._diagnosed(batch)}; the update was not made{_but_statistics(state.model)}. "
            f"Last good checkpoint: {saved if saved is not None and saved.exists() else 'none'}. "
            "Try a smaller lr, a warm-up, clip_norm=1.0, or autocast=None"
        )

    def _diagnosed(self, batch: int) -> str:
        state = self.state
        if self.inputs is not None and self.inputs[0] == batch:
            return diagnose(state.model, self.inputs[1])
        if isinstance(self.feed.batches, Loaded) and self.feed.batches.once:
            return "the batch cannot be read again to tell where it arises"
        return diagnose(state.model, next(self.feed.epoch(state.epoch, start=batch)).part.inputs)

    def _record(self) -> dict[str, Any]:
        state = self.state
        record = {"epoch": state.epoch + 1, **state.means(), **_rate(state.rates), "images": state.images}
        record["train_s"] = round(state.train_s, 3)
        if self.validation is not None:
            try:
                record |= self._validated()
            except Exception:  # Stop saves by itself
                self._save()
                raise
        if self.after_epoch is not None:
            record |= _named_otherwise(self.after_epoch(state.epoch + 1), record)
        if workers.is_first():
            _log.info("epoch %d/%d: %s", record["epoch"], self.epochs, _in_words(record))
        return record

    def _validated(self) -> dict[str, float]:
        found = self._validate("validation_")
        if self.state.ema is not None:
            with self.state.ema.applied(self.state.model):
                found |= self._validate("ema_validation_")
        return found

    def _validate(self, prefix: str) -> dict[str, float]:
        assert self.validation is not None
        with self.stopping.interruptible() if workers.world_size() == 1 else nullcontext():  # workers would wait for each other
            seen = measured(
                self.state.model,
                self.validation,
                self.state.task,
                reference=self.feed.reference,
                together=not isinstance(self.state.task.metric, Collected),
                highest_label=self.highest_label,
            )
        return {f"{prefix}{name}": value for name, value in seen.numbers.items()}

    def _save(self) -> None:
        if self.folder is not None and workers.is_first():
            self.state.save(self.folder / CHECKPOINT)
            self._write_metrics()

    def _write_metrics(self) -> None:
        assert self.folder is not None
        write_atomic(self.folder / METRICS, "".join(json.dumps(record) + "\n" for record in self.state.records))


def _rate(rates: Rates) -> dict[str, float]:
    return {} if rates.used is None else {"lr": rates.used}


def _of_worker() -> str:
    return "" if workers.world_size() == 1 else f"on the images of worker {workers.rank()} of {workers.world_size()} (from 0), "


def _but_statistics(model: nn.Module) -> str:
    if not any(True for _ in model.buffers()):
        return ""
    return ", but the model in memory is not usable: its norm statistics have taken that batch in"


def _named_otherwise(values: Mapping[str, float], record: Mapping[str, Any]) -> dict[str, float]:
    taken = [name for name in values if name in record]
    if taken:
        raise BitscapeError(f"after_epoch returns {', '.join(taken)}, which the loop records itself; return other names")
    return {name: float(value) for name, value in values.items()}


def _in_words(record: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in record.items() if name not in ("epoch", "images")}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
