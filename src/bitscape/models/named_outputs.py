"""What a network returns, by name.

    a tensor                              output0
    a tuple or list                       output0, output1, ...
    a mapping, named tuple or dataclass   its keys
    structures within structures          joined by dots: {"boxes": [a, b]} has boxes.0 and boxes.1

Values other than tensors (None, numbers) are left out; those behind them keep their numbers.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.nested import tensors_by_path


def named_outputs(returned: Any) -> dict[str, Tensor]:
    """The tensors that a network returned, by name and in order; a flat mapping of tensors keeps its names.

    Raises:
        BitscapeError: no tensor among them, or two of one name.
    """
    outputs: dict[str, Tensor] = {}
    for path, tensor in tensors_by_path(returned):
        name = _name(path)
        if name in outputs:
            raise BitscapeError(f"network: two of its outputs are called {name!r}; rename one")
        outputs[name] = tensor
    if not outputs:
        raise BitscapeError(f"network: it returns no tensor but {type(returned).__name__}; return tensors, or a tuple or dict of them")
    return outputs


@contextmanager
def returning_by_name(network: nn.Module) -> Iterator[None]:
    """Within the block the network returns a tensor where it did so before, and otherwise its outputs as a dict by name."""
    shadowed, inner = vars(network).get("forward"), network.forward

    @functools.wraps(inner)
    def forward(*args: Any, **keywords: Any) -> Any:
        returned = inner(*args, **keywords)
        return returned if isinstance(returned, Tensor) else named_outputs(returned)

    network.forward = forward
    try:
        yield
    finally:
        del network.forward
        if shadowed is not None:
            network.forward = shadowed


def _name(path: tuple[object, ...]) -> str:
    """The outputs of a tuple have no names of their own: the first part says what the number counts."""
    first, *rest = path or (0,)
    return joined_name([f"output{first}" if isinstance(first, int) else first, *rest])


def joined_name(path: Sequence[object]) -> str:
    """The keys and numbers that lead to a tensor, as one name."""
    return ".".join(map(str, path))
