"""Arguments of public functions, checked against their annotations.

A value of a wrong type is refused at the door, by the name of its argument. What a text or a number
may be is checked where it is read.
"""

import inspect
import reprlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from bitscape.errors import BitscapeError

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "None",
    type: "a class",
    Callable: "a function",
}
"""What people call these types."""


def checked(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Return the function; called with a value that its annotation rules out, it raises BitscapeError."""
    signature = inspect.signature(function)
    hints = cache(lambda: typing.get_type_hints(function))

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the function says it better
            given = {}
        _check(given, hints())
        return function(*args, **kwargs)

    return call


def check_fields(settings: Any) -> None:
    """Raise BitscapeError if a field of a dataclass has a value that its annotation rules out."""
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    _check(given, typing.get_type_hints(type(settings)))


def _check(given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            raise BitscapeError(
                f"{name}={reprlib.repr(value)}: it must be {_described(hints[name])}"
            )


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str)
    if kind is Callable:
        return callable(value)
    if kind is type:
        return isinstance(value, type)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if parts and issubclass(kind, Mapping):
        return isinstance(value, kind) and all(
            _fits(key, parts[0]) and _fits(entry, parts[1]) for key, entry in value.items()
        )
    if parts and issubclass(kind, Iterable):
        if issubclass(kind, Sequence) and isinstance(value, Iterator):
            return False  # the check would use it up
        return _is_list_like(value) and all(_fits(entry, parts[0]) for entry in _entries(value))
    return isinstance(value, kind) and not isinstance(value, type)


def _is_list_like(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | type)


def _entries(values: Iterable[Any]) -> Iterable[Any]:
    """Return the entries of what can be gone through again."""
    return values if isinstance(values, list | tuple | set | frozenset) else ()


def _described(hint: Any) -> str:
    *others, last = dict.fromkeys(_forms(hint))
    return f"{', '.join(others)} or {last}" if others else last


def _forms(hint: Any) -> list[str]:
    """Say what fits the annotation, one by one."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return [form for part in parts for form in _forms(part)]
    if kind is Literal:
        return [repr(part) for part in parts]
    if kind is bool:
        return ["True", "False"]
    if kind in WORDS:
        return [WORDS[kind]]
    if parts and issubclass(kind, Mapping):
        return [f"a mapping from {_described(parts[0])} to {_described(parts[1])}"]
    if parts and issubclass(kind, Iterable):
        return [f"a list (each entry {_described(parts[0])})"]
    return [f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"]
