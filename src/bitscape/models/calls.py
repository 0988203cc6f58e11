"""Which functions a module's forward calls, read from its code."""

import dis
import inspect
from collections.abc import Iterable
from functools import cache
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn


@cache
def code_of_forward(kind: type[nn.Module]) -> tuple[CodeType, ...]:
    """The code of the forward of a class, and of what it calls in turn: methods of the class, and functions that are not torch's."""
    kinds = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    pending, codes = list(_methods(kinds, "forward")), []
    visited: set[FunctionType] = set()
    while pending:
        function = pending.pop()
        if function in visited:
            continue
        visited.add(function)
        for code in _nested(function.__code__):
            codes.append(code)
            for name in code.co_names:
                pending += _methods(kinds, name)
                pending += _functions(function.__globals__.get(name))
    return tuple(codes)


def stored_attributes(codes: Iterable[CodeType]) -> set[str]:
    """Names of attributes that the code sets."""
    return {step.argval for code in codes for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}


def _methods(kinds: Iterable[type], name: str) -> Iterable[FunctionType]:
    """The functions of that name of every class, as super() may reach any of them."""
    for kind in kinds:
        method: Any = vars(kind).get(name)
        method = getattr(method, "__func__", getattr(method, "fget", method))  # static, class method; property
        if isinstance(method, FunctionType):
            yield cast(FunctionType, inspect.unwrap(method))


def _functions(value: Any) -> Iterable[FunctionType]:
    if isinstance(value, FunctionType) and str(value.__module__).partition(".")[0] != "torch":
        yield cast(FunctionType, inspect.unwrap(value))


def _nested(code: CodeType) -> Iterable[CodeType]:
    """The code and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
