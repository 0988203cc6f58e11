"""The tensors that a network takes or returns, out of whatever holds them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists, mappings and dataclasses, in order."""
    for _, tensor in tensors_by_path(value):
        yield tensor


def tensors_by_path(value: Any, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], Tensor]]:
    """The same, each with the keys, field names and numbers that lead to it."""
    if isinstance(value, Tensor):
        yield path, value
    else:
        for key, item in _items(value):
            yield from tensors_by_path(item, (*path, key))


def _items(value: Any) -> Iterator[tuple[object, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
