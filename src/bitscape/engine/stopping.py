"""SIGINT and SIGTERM wait for the end of a batch, so that a run can write a checkpoint before it ends."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_log = logging.getLogger("bitscape.engine")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(KeyboardInterrupt):
    """The run was asked to stop and is between two batches."""


class Stopping:
    """Whether a run was asked to stop, and whether it may be interrupted now."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that came."""
        self._may_interrupt = False

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Note signals within the block instead of obeying them; whoever handled them before gets them after it.

        A second signal is obeyed at once. Signals that are ignored stay so. Does nothing outside of the main thread, which alone gets
        signals. After a signal the block ends with what its handler raises, or with KeyboardInterrupt.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in self._before:
            signal.signal(number, self._note)
        stopped = False
        try:
            yield
        except Stop:
            stopped = True
        finally:
            self._restore()
        if self.signal is not None:
            signal.raise_signal(self.signal)
        if stopped or self.signal is not None:
            raise KeyboardInterrupt  # also where another worker was asked, or the handler came back

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise Stop within the block as soon as a signal comes: for long work that leaves the run as it is."""
        self._may_interrupt = True
        try:
            if self.signal is not None:
                raise Stop
            yield
        finally:
            self._may_interrupt = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._restore()
            signal.raise_signal(number)
            raise KeyboardInterrupt
        self.signal = number
        if self._may_interrupt:
            raise Stop
        _log.info("stopping after this batch; the same signal again stops at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
