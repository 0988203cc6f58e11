"""Standard output and standard error that may be closed or full before the work is done."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from bitscape.errors import BitscapeError


class _Outlived:
    """A text stream that stays writable when nobody takes its text any more: files are still to be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """Why the text was not taken."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as long as that is possible."""
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush, as long as that is possible."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        with contextlib.suppress(OSError, ValueError):  # the interpreter flushes at its end what is still buffered
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def outlived_streams() -> Iterator[None]:
    """Within the block, output that nobody takes any more is dropped. Raises BitscapeError after it, unless the reader just left."""
    if sys.stdout is None or sys.stderr is None:  # closed by who started this process
        with contextlib.ExitStack() as block:
            nowhere = block.enter_context(open(os.devnull, "w"))
            block.enter_context(redirect_stdout(sys.stdout or nowhere))
            block.enter_context(redirect_stderr(sys.stderr or nowhere))
            yield
        return
    out: Any = _Outlived(sys.stdout)
    err: Any = _Outlived(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield
        out.flush()
    if out.error is not None and not isinstance(out.error, BrokenPipeError):
        raise BitscapeError(f"standard output: {out.error.strerror}; files that were asked for are written")
