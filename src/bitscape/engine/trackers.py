"""Where a run is watched while it goes on: TensorBoard, or anything with three methods. metrics.jsonl is written in any case."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from bitscape.errors import needs_extra

_log = logging.getLogger("bitscape.engine")
Record = Mapping[str, Any]


@runtime_checkable
class Tracker(Protocol):
    """Told how a run goes, on the first worker only; whatever it raises is logged once, and it is not called again."""

    def start(self, settings: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Begin: settings as in run.json, and the records of epochs finished before, of a run that goes on."""

    def epoch(self, record: Record) -> None:
        """Take the record of an epoch just finished, as in metrics.jsonl; `record["epoch"]` counts from 1.

        An epoch comes again, with the same numbers, if the run was killed before its checkpoint was written.
        """

    def finish(self) -> None:
        """End, also when the run failed or was interrupted."""


class TensorBoard:
    """Writes each epoch's numbers as scalars, and the settings as text, where `tensorboard --logdir folder` finds them.

    A run that goes on continues its curves. Raises BitscapeError when the tensorboard package is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        with needs_extra("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._kind: Any = SummaryWriter
        self._folder = os.fspath(folder)

    def start(self, settings: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Open a file of events in the folder."""
        self._writer = self._kind(self._folder, purge_step=len(records) + 1)  # hides steps that come again
        self._writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```", len(records) + 1)

    def epoch(self, record: Record) -> None:
        """Write the epoch's numbers."""
        for name, value in record.items():
            if name != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


TRACKERS: Mapping[str, Callable[[str], Tracker]] = {"tensorboard": TensorBoard}
"""Name -> tracker made from one text, such as a folder."""


class Watched:
    """Several trackers as one that never fails."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def start(self, settings: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Begin them all."""
        self._each(lambda tracker: tracker.start(settings, records))

    def epoch(self, record: Record) -> None:
        """Tell them all; each gets a record of its own."""
        self._each(lambda tracker: tracker.epoch(dict(record)))

    def finish(self) -> None:
        """End them all."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                _log.warning("tracker %s failed and is left out from here on: %s: %s", name, type(error).__name__, error)
