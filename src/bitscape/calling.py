"""How a network is called: with one tensor, with several, or by keyword; and what is done to all of its inputs alike."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.nested import tensors_in

Inputs: TypeAlias = Any
"""A tensor, a tuple of arguments, or a mapping from keyword to argument; tensors may be nested in them."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call `model` with a tuple as its arguments, a mapping as its keywords, anything else as its one argument."""
    arguments, keywords = arguments_of(inputs)
    return model(*arguments, **keywords)


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the arguments by position and by keyword with which a network is called."""
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return `tree` with `function` of every tensor in it.

    Tuples, lists, mappings and dataclasses are walked, as by `tensors_in`; all else stays.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [map_tensors(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}
        return dataclasses.replace(tree, **map_tensors(function, fields))
    return tree


def sample_count(inputs: Inputs) -> int:
    """Return how many samples `inputs` hold: the first size of their first tensor that has one.

    Raises BitscapeError if there is none.
    """
    for tensor in tensors_in(inputs):
        if tensor.ndim:
            return len(tensor)
    raise BitscapeError(
        f"inputs: no tensor with a batch dimension in a {type(inputs).__name__}; "
        "pass inputs=, a function from a batch to what the network is called with"
    )


def rows_of(tree: Any, rows: slice | Tensor, samples: int) -> Any:
    """Return the `rows` of every tensor in `tree` whose first size is `samples`; other tensors belong to every sample."""
    return map_tensors(lambda t: t[rows] if t.ndim and len(t) == samples else t, tree)


def first_rows(inputs: Inputs, count: int) -> Inputs:
    """Return the first `count` samples of `inputs`."""
    return rows_of(inputs, slice(0, count), sample_count(inputs))


def moved(tree: Any, device: torch.device) -> Any:
    """Return `tree` with every tensor on `device`."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), tree)


def shapes_of(inputs: Inputs) -> list[list[int]]:
    """Return the shape of every tensor, as plain lists."""
    return [list(tensor.shape) for tensor in tensors_in(inputs)]
