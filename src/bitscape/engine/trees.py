"""Nested Python data with tensors in it, as named tensors and JSON: nothing is pickled."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitscape.errors import BitscapeError


def packed(tree: Any, path: str) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of `tree` by the path to each, which starts with `path`, and all else as
    JSON.

    Raises BitscapeError for anything but tensors, numbers, texts, None, lists, tuples and mappings.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _packed(tree, path, tensors)


def _packed(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, Mapping):
        kind = (
            "counter" if isinstance(tree, Counter) else "mapping"
        )  # MultiStepLR counts its milestones
        return {
            kind: [
                [_packed(key, path, tensors), _packed(value, f"{path}.{key}", tensors)]
                for key, value in tree.items()
            ]
        }
    if isinstance(tree, list | tuple):
        items = [_packed(item, f"{path}.{number}", tensors) for number, item in enumerate(tree)]
        return items if isinstance(tree, list) else {"tuple": items}
    raise BitscapeError(
        f"{path} is a {type(tree).__name__}, which a checkpoint cannot store; leave folder out, "
        "or use another one"
    )


def unpacked(packed_tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the data that `packed` took apart.

    Raises KeyError, TypeError or ValueError for anything else.
    """
    if isinstance(packed_tree, list):
        return [unpacked(item, tensors) for item in packed_tree]
    if not isinstance(packed_tree, dict):
        return packed_tree
    ((kind, value),) = packed_tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(unpacked(item, tensors) for item in value)
    if kind in ("mapping", "counter"):
        mapping = {unpacked(key, tensors): unpacked(item, tensors) for key, item in value}
        return mapping if kind == "mapping" else Counter(mapping)
    raise ValueError(f"unknown kind {kind!r}")
