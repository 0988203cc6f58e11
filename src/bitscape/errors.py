"""The one error type for bad input, and the nearest-name hint that its messages carry."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin


class BitscapeError(ValueError):
    """Bad input: the message names the argument, its value, what is allowed and the next step."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return "; nearest: a, b" for the options that resemble `name`, or "" when none does."""
    close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def check_choices(settings: Any) -> None:
    """Raise BitscapeError if a field of the dataclass `settings` that is declared a Literal holds anything else."""
    for field in fields(settings):
        value, allowed = getattr(settings, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in allowed:
            raise BitscapeError(f"{field.name} = {value!r}: allowed are {', '.join(map(repr, allowed))}")


@contextmanager
def prefixed(place: object) -> Iterator[None]:
    """Within the block, `place`, such as the path of a file, stands in front of the messages of BitscapeErrors."""
    try:
        yield
    except BitscapeError as error:
        raise type(error)(f"{place}: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error of another package says first; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # by name: no torch here


@contextmanager
def explained_forward(images: Any) -> Iterator[None]:
    """Within the block, a network that fails on the tensor `images` raises a BitscapeError with their shape and the network's words."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, BitscapeError) or is_out_of_memory(error):
            raise
        advice = (
            "a norm has no variance in it: give at least 2 images, and as many for each batch, part of a batch and worker"
            if "more than 1 value per channel" in str(error)
            else "check channels, size and normalization against what it was trained with"
        )
        raise BitscapeError(
            f"images: the network fails on a batch of shape {tuple(images.shape)}, {images.dtype}: {first_line(error)}; {advice}"
        ) from error



@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Within the block, a missing package raises a BitscapeError that names the extra of bitscape that brings it."""
    try:
        yield
    except ImportError as error:
        raise BitscapeError(f"a package is missing ({error}): pip install 'bitscape[{extra}]'") from error
