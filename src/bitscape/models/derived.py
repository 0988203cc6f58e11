"""Classes made at run time whose forward runs within a context; their modules are copied and pickled as others are."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, wraps
from typing import Any, TypeAlias, cast

from torch import nn

Context: TypeAlias = Callable[[nn.Module], AbstractContextManager[Any]]


@cache
def forward_within(kind: Any, context: Context) -> Any:
    """The class `kind`, whose forward runs within `context(module)`; the forward's signature stays.

    `context` is a function of a Python module, so that pickle can name it.
    """

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with context(self):
            return kind.forward(self, *args, **kwargs)

    def reduced(module: nn.Module) -> tuple[Any, ...]:
        return _empty, _made_of(type(module)), module.__dict__

    attributes = {"forward": forward, "__module__": __name__, "__reduce__": reduced, "_made_of": (kind, context)}
    return type(kind.__name__, (kind,), attributes)


def _made_of(kind: Any) -> tuple[Any, ...]:
    """The class as written, and the contexts in which its forward runs, innermost first: what pickle stores."""
    contexts: list[Context] = []
    while "_made_of" in vars(kind):
        kind, context = kind._made_of
        contexts.insert(0, context)
    return kind, *contexts


def _empty(kind: Any, *contexts: Context) -> nn.Module:
    for context in contexts:
        kind = forward_within(kind, context)
    return cast(nn.Module, kind.__new__(kind))
