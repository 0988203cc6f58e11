"""Copies of a user's network that work on their own."""

import copy
import dis
from collections.abc import Iterable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from bitscape.errors import BitscapeError, first_line
from bitscape.models.layers import quantizable_layers
from bitscape.nested import tensors_in


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model`.

    Outputs that modules keep, as feature extractors do, stay without their graph. Raises BitscapeError for what deepcopy
    refuses, and for functions in attributes that would run layers of `model` in place of the copy's.
    """
    _refuse_held_layers(model)
    try:
        return copy.deepcopy(model, _kept_outputs(model))
    except Exception as error:
        quantizable_layers(model)  # names the layer whose computed weight deepcopy refuses
        raise BitscapeError(
            f"model: it cannot be copied ({type(error).__name__}: {first_line(error)}); "
            "remove what deepcopy refuses, such as outputs that the network keeps"
        ) from error


def _kept_outputs(model: nn.Module) -> dict[int, Any]:
    """Deepcopy refuses tensors that a graph made: their id -> what stands in for them."""
    held = (tensor for module in model.modules() for tensor in tensors_in(list(vars(module).values())))
    return {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}


def _refuse_held_layers(model: nn.Module) -> None:
    """Deepcopy copies no functions: one that holds a layer by its closure or by a global name keeps the layer of the original."""
    modules = set(model.modules())
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            function = value.func if isinstance(value, partial) else value
            if isinstance(function, FunctionType) and _holds(function, modules, set()):
                place = f"{name}.{attribute}" if name else attribute
                raise BitscapeError(
                    f"model: {place} is a function that holds layers of the network, and a copy would run the original's; "
                    "make it a method of the class, or bind it: types.MethodType(function, module)"
                )


def _holds(function: FunctionType, modules: set[nn.Module], visited: set[int]) -> bool:
    visited.add(id(function))
    for value in (*_closure(function), *_globals(function)):
        if isinstance(value, nn.Module) and value in modules:
            return True
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in modules:
            return True
        if isinstance(value, FunctionType) and id(value) not in visited and _holds(value, modules, visited):
            return True
    return False


def _closure(function: FunctionType) -> Iterable[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue


def _globals(function: FunctionType) -> Iterable[Any]:
    read = {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}
    return [value for name, value in function.__globals__.items() if name in read]
