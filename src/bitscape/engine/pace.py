"""The clocks of a run: time in training steps, since the last checkpoint, since the last log line."""

import time

REPORT_EVERY_S = 5.0
"""Seconds between two log lines; each waits for the GPU once."""


class Pace:
    """Counts steps and the seconds spent in them; saving and validating are left out."""

    def __init__(self) -> None:
        self._mark = self._saved = self._reported = time.monotonic()
        self._run_s = 0.0
        self._run_steps = 0

    def count_step(self) -> None:
        """Note one finished step."""
        self._run_steps += 1

    def lap(self) -> float:
        """Return the seconds of training since the last `lap` or `go_on`."""
        now = time.monotonic()
        elapsed, self._mark = now - self._mark, now
        self._run_s += elapsed
        return elapsed

    def go_on(self, *, saved: bool) -> None:
        """Start counting again after something that was not training, such as writing a checkpoint."""
        self._mark = time.monotonic()
        if saved:
            self._saved = self._mark

    def step_s(self) -> float:
        """Return the mean seconds of a step, up to the last `lap`."""
        return self._run_s / self._run_steps

    def save_due(self, every_s: float) -> bool:
        """Say whether the last checkpoint is `every_s` seconds old."""
        return time.monotonic() - self._saved >= every_s

    def report_due(self) -> bool:
        """Say whether it is time for a log line; if so, the next one is due `REPORT_EVERY_S` from now."""
        now = time.monotonic()
        due = now - self._reported >= REPORT_EVERY_S
        if due:
            self._reported = now
        return due
