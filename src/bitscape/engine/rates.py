"""Learning rates from step to step: by a schedule of ours, by one of torch, or as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bitscape.engine.describe import describe
from bitscape.errors import BitscapeError

_MOVING = (
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_get_lr_called_within_step",
    "_is_initial",
    "T_cur",
)
"""What changes in a torch schedule while it runs."""


@runtime_checkable
class Schedule(Protocol):
    """What learning rates are multiplied by."""

    def factor(self, step: int, *, steps: int, steps_per_epoch: int) -> float:
        """Return the factor at `step` of `steps`, both counted over all epochs."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a run is. Of data whose length is not known an epoch counts as one step."""

    step: int
    steps: int
    steps_per_epoch: int

    @classmethod
    def at(cls, epoch: int, batch: int, *, epochs: int, batches: int | None) -> "Position":
        """Return the position before `batch` of `epoch`, both from 0; the position never lies in
        the next epoch.
        """
        per_epoch = 1 if batches is None else batches
        return cls(epoch * per_epoch + min(batch, per_epoch - 1), epochs * per_epoch, per_epoch)


@dataclass(kw_only=True)
class Rates:
    """The learning rates of a run."""

    optimizer: Optimizer
    schedule: Schedule | LRScheduler | None
    """One of torch is stepped after each update; None leaves all rates as they are."""
    base: list[Any] = field(init=False)
    """What a schedule of ours multiplies: each group's rate before the run's first step."""
    used: float | None = field(default=None, init=False)
    """The first group's rate in the last step; None for an optimizer that finds its own."""

    def __post_init__(self) -> None:
        self.base = [group.get("lr") for group in self.optimizer.param_groups]

    def put_back(self) -> None:
        """Undo a schedule of ours, so that the optimizer's next run starts at its full rates."""
        if self.schedule is not None and not isinstance(self.schedule, LRScheduler):
            for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = base

    def before_step(self, position: Position) -> None:
        """Set the rates of the step at hand."""
        if self.schedule is not None and not isinstance(self.schedule, LRScheduler):
            factor = self.schedule.factor(
                position.step, steps=position.steps, steps_per_epoch=position.steps_per_epoch
            )
            for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = base * factor
        rate = self.optimizer.param_groups[0].get("lr")
        self.used = None if rate is None else float(rate)

    def after_step(self) -> None:
        """Move a schedule of torch on."""
        if isinstance(self.schedule, LRScheduler):
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        """What a run goes on from."""
        return {
            "base": self.base,
            "used": self.used,
            "schedule": self.schedule.state_dict()
            if isinstance(self.schedule, LRScheduler)
            else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.used, self.base = state["used"], list(state["base"])
        if isinstance(self.schedule, LRScheduler):
            self.schedule.load_state_dict(dict(state["schedule"]))


def check_schedule(schedule: object, optimizer: Optimizer, steps: int | None = None) -> None:
    """Raise BitscapeError unless `schedule` can set the rates of `optimizer`, and for so many steps."""
    if isinstance(schedule, ReduceLROnPlateau):
        raise BitscapeError(
            "schedule is ReduceLROnPlateau, which waits for a metric; use one that is stepped by "
            "itself, e.g. OneCycleLR"
        )
    if isinstance(schedule, LRScheduler):
        if schedule.optimizer is not optimizer:
            raise BitscapeError(
                f"schedule: the {type(schedule).__name__} was built on another optimizer; pass "
                "that one as optimizer=, or give a function "
                "optimizer -> scheduler"
            )
        last = getattr(schedule, "total_steps", None)
        if steps is not None and isinstance(last, int) and last < steps:
            raise BitscapeError(
                f"schedule: the {type(schedule).__name__} ends after {last} steps, and the run has {steps}: "
                "it is stepped after each batch; give it epochs times batches"
            )
    elif isinstance(schedule, type) or not callable(getattr(schedule, "factor", None)):
        raise BitscapeError(
            f"schedule is {schedule!r}; it must be Cosine(...), a torch LRScheduler, or a "
            "function optimizer -> LRScheduler"
        )


def describe_schedule(schedule: Schedule | LRScheduler | None) -> Any:
    """Return the settings of a schedule as JSON data."""
    if not isinstance(schedule, LRScheduler):
        return describe(schedule)
    return {"kind": type(schedule).__name__, **_settled(describe(schedule.state_dict()))}


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _settled(item) for name, item in value.items() if name not in _MOVING}
    return [_settled(item) for item in value] if isinstance(value, list) else value
