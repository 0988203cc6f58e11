"""Ctrl-C and SIGTERM at any moment of a command, also while libraries are imported."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bitscape.cli import INTERRUPTED as INTERRUPTED

EXIT_SIGNAL = 128
"""Plus the number of the signal, as shells count."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupting() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM raise KeyboardInterrupt, and their numbers are noted in the list; ignored ones stay ignored.

    While a module is imported they end the process at once: half-imported libraries hang or fail in odd ways, and nothing is under way.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            os.write(2, f"{INTERRUPTED}\n".encode())
            os._exit(EXIT_SIGNAL + number)
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield received
        return
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
