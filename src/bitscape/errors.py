"""The one error type for bad input, and the nearest-name hint that its messages carry."""

import difflib
from collections.abc import Iterable


class BitscapeError(ValueError):
    """Bad input: the message names the argument, its value, what is allowed and the next step."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return "; nearest: a, b" for the options that resemble `name`, or "" when none does."""
    close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""
