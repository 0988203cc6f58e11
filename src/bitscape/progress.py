"""Progress of long work, as log lines with the time left."""

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

_log = logging.getLogger("bitscape.progress")
Item = TypeVar("Item")


def track(items: Iterable[Item], *, label: str, total: int | None = None, every_s: float = 5.0) -> Iterator[Item]:
    """Yield `items`; every `every_s` seconds log how far the work is and how long the rest will take."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = reported = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - reported >= every_s:
            reported = now
            _log.info("%s", _line(label, done, total, now - start))
        yield item


def _line(label: str, done: int, total: int | None, elapsed_s: float) -> str:
    if total is None:
        return f"{label} {done}, {elapsed_s:.0f} s so far"
    return f"{label} {done}/{total}, {elapsed_s / done * (total - done):.0f} s left"
