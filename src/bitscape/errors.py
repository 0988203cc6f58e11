"""The one error type for bad input, the nearest-name hint that its messages carry, and text from files made safe to show."""

import difflib
import itertools
import re
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral
from typing import Any, Literal, TypeVar, get_args, get_origin

MESSAGE_START, MESSAGE_END = 1500, 500
"""Characters of a long message that are kept: its start names the file, its end the next step."""
COMPARED_NAMES, COMPARED_LENGTH = 10_000, 200
"""Names that `nearest` compares, and their length: the time grows with the product of both lengths."""
_RANGES = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff"
"""Control characters, line separators, changes of the writing direction, and code points that are not characters."""
_UNSAFE, _UNSAFE_IN_LINES = re.compile(rf"[\n\t{_RANGES}]"), re.compile(f"[{_RANGES}]")
Item = TypeVar("Item", bound=Hashable)


class BitscapeError(ValueError):
    """Bad input: the message names the argument, its value, what is allowed and the next step.

    Messages repeat what stands in files: they are cut in the middle where they are long, and control characters are written as escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


def printable(text: str) -> str:
    r"""Write as escapes what could act on a terminal, end a line or change the order of the text: "\x1b" for ESC."""
    return _UNSAFE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """As `printable`, but line feeds and tabs stay."""
    return _UNSAFE_IN_LINES.sub(_escape, text)


def one_line(message: str) -> str:
    """A message that is `printable` and has its middle cut out where it is long."""
    if len(message) > MESSAGE_START + MESSAGE_END:
        left_out = len(message) - MESSAGE_START - MESSAGE_END
        message = f"{message[:MESSAGE_START]} [... {left_out:,} characters ...] {message[-MESSAGE_END:]}"
    return printable(message)


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def nearest(name: str, options: Iterable[str]) -> str:
    """Return "; nearest: a, b" for the options that resemble `name`, or "" when none does, or when `name` is very long."""
    if len(name) > COMPARED_LENGTH:
        return ""
    compared = [option for option in itertools.islice(options, COMPARED_NAMES) if len(option) <= COMPARED_LENGTH]
    close = difflib.get_close_matches(name, compared, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def first_repeated(items: Iterable[Item]) -> Item | None:
    """Return the first item that equals an earlier one, or None."""
    seen: set[Item] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


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
def explained_forward(inputs: Any) -> Iterator[None]:
    """Within the block, a network that fails on `inputs` raises a BitscapeError with their shapes and its words.

    The inputs are a tensor, or tensors in tuples, lists and mappings.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, BitscapeError) or is_out_of_memory(error):
            raise
        if "more than 1 value per channel" in str(error):
            advice = "a norm has no variance in it: give at least 2 images, and as many for each batch, part of a batch and worker"
        elif isinstance(error, TypeError):
            advice = (
                "a tuple holds the arguments of its forward, a mapping its keywords, and labels are "
                "neither; inputs= says how a batch is read"
            )
        else:
            advice = (
                "check channels, size and normalization against what it was trained with; the first "
                "dimension counts samples"
            )
        raise BitscapeError(
            f"{'images' if hasattr(inputs, 'shape') else 'inputs'}: the network fails on a batch of "
            f"{_shapes(inputs)}: {first_line(error)}; {advice}"
        ) from error


@contextmanager
def explained_backward() -> Iterator[None]:
    """Within the block, a network whose backward pass its own in-place operations break raises a BitscapeError."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise BitscapeError(
            "model: no gradient can be computed, because it overwrites in place what its backward "
            "pass needs; write x = x + y for x += y, and relu for relu_; methods kl and local need "
            "no gradient"
        ) from error


def _shapes(inputs: Any) -> str:
    """Shape and type of a tensor, and of the tensors in tuples, lists and mappings by name or place."""
    if hasattr(inputs, "shape"):
        return f"shape {tuple(inputs.shape)}, {inputs.dtype}"
    entries = inputs.items() if hasattr(inputs, "items") else enumerate(inputs) if isinstance(inputs, tuple | list) else ()
    return f"{type(inputs).__name__} ({'; '.join(f'{key}: {_shapes(value)}' for key, value in entries)})"


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Within the block, a missing package raises a BitscapeError that names the extra of bitscape that brings it."""
    try:
        yield
    except ImportError as error:
        raise BitscapeError(f"a package is missing ({error}): pip install 'bitscape[{extra}]'") from error


def at_least_one(**counts: int) -> None:
    """Raise BitscapeError unless every argument, which counts something, is a whole number from 1."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise BitscapeError(f"{name} = {count}: it must be a whole number from 1")
