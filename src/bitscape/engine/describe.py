"""Settings as plain JSON data, so that a run can be told from another one."""

import dis
import enum
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import FakeQuantizer
from bitscape.version import __version__

_SAMPLED = 256
"""Rows of a large tensor that its hash reads: enough to tell data sets apart, without reading gigabytes."""


def describe(value: Any) -> Any:
    """Return `value` as JSON data: dataclasses as their fields, tensors and networks as shapes and hashes, functions as
    names and hashes.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numpy.ndarray):
        return describe(torch.from_numpy(value))
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sample_sha256": _hash({"": value})}
    if isinstance(value, nn.Module):
        return {"kind": type(value).__name__, "sample_sha256": _hash(value.state_dict())}
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: describe(getattr(value, field.name)) for field in fields(value) if field.init}
        return {"kind": type(value).__name__, **settings}
    if isinstance(value, Mapping):
        return {str(key): describe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [describe(inner) for inner in value]
    if isinstance(value, torch.dtype | enum.Enum):
        return str(value)
    if isinstance(value, partial):
        return {"kind": "partial", "function": describe(value.func), "arguments": describe([value.args, value.keywords])}
    if isinstance(value, MethodType):
        return describe(value.__func__)
    if isinstance(value, FunctionType):
        return f"{value.__qualname__}, code {_function_hash(value)}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def described_code(value: Any) -> Any:
    """Describe functions by what they compute, so that two of one name differ: hashes of their code, and what it refers to.

    Objects are described by the methods of their class and what they hold; all else as `describe` does.
    """
    return _coded(value, [])


def _coded(value: Any, outer: list[Any]) -> Any:
    if any(value is seen for seen in outer):
        return "itself"
    inside = [*outer, value]
    if isinstance(value, MethodType):
        return [_coded(value.__func__, inside), _coded(value.__self__, inside)]
    if isinstance(value, partial):
        return [_coded(part, inside) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, FunctionType):
        return {"name": value.__qualname__, "code": _code_hash(value.__code__), **_referred(value, inside)}
    if isinstance(value, Mapping):
        return {str(key): _coded(inner, inside) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_coded(inner, inside) for inner in value]
    if hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | Tensor | ModuleType):
        methods = {name: inner for name, inner in vars(type(value)).items() if isinstance(inner, FunctionType)}
        return {"kind": type(value).__qualname__, "holds": _coded(vars(value), inside), "methods": _coded(methods, inside)}
    return describe(value)


def _referred(function: FunctionType, outer: list[Any]) -> dict[str, Any]:
    """What the code reads besides its arguments: defaults, variables around it, and globals; not those that it sets.

    Of the functions among globals, those of its own module are followed.
    """
    own, set_here = function.__module__, _set_by(function.__code__)
    of_globals = [name for name in function.__code__.co_names if name in function.__globals__ and name not in set_here]
    read = _around(function) | {name: function.__globals__[name] for name in of_globals}
    defaults = [function.__defaults__, function.__kwdefaults__]
    of_module = {name: getattr(inner, "__module__", own) == own for name, inner in read.items()}
    coded = {name: _coded(inner, outer) if of_module[name] else describe(inner) for name, inner in read.items()}
    return {"defaults": _coded(defaults, outer), "reads": coded}


def _around(function: FunctionType) -> dict[str, Any]:
    """The variables around a function that it reads; not those that it sets, which differ from call to call."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    set_here = _set_by(function.__code__)
    return {name: cell.cell_contents for name, cell in cells if name not in set_here and _is_filled(cell)}


def _set_by(code: CodeType) -> set[str]:
    return {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "STORE_GLOBAL")}


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty one raises
    except ValueError:
        return False
    return True


def _code_hash(code: CodeType) -> str:
    return hashlib.sha256(repr(_constants(code)).encode()).hexdigest()[:16]


def _constants(value: Any) -> Any:
    """What tells code from other code, in an order that does not depend on the process; not the places of its lines."""
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_varnames, [_constants(inner) for inner in value.co_consts]]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return [_constants(inner) for inner in value] if isinstance(value, tuple) else value


def bits_of(model: nn.Module) -> dict[str, Any]:
    """Return layer -> the bits of its weight and of its input, several where its quantizer has scales for several; {} for a float network.

    A state dict does not tell them: the scales of two and of four bits have the same names and shapes.
    """
    return {
        name: {"weight": _bits(layer.weight_quantizer), "activation": _bits(layer.input_quantizer)}
        for name, layer in quantized_layers(model).items()
    }


def _bits(quantizer: nn.Module) -> Any:
    found = [describe(module.bits) for module in quantizer.modules() if isinstance(module, FakeQuantizer)]
    return found[0] if len(found) == 1 else found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    return {
        "python": sys.version.split()[0],
        "bitscape": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _function_hash(function: FunctionType) -> str:
    """Of its code, its defaults and the numbers, texts, tensors and functions of its closure. What it looks up elsewhere is left
    out, and so is what it counts up by itself: that differs from call to call.
    """
    settings = {
        name: describe(value)
        for name, value in _around(function).items()
        if value is not function and isinstance(value, bool | int | float | str | Tensor | FunctionType)
    }
    told = [_constants(function.__code__), describe(function.__defaults__), describe(function.__kwdefaults__), settings]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(_sample(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.ndim == 0 or len(tensor) <= _SAMPLED or tensor.numel() <= 1 << 20:
        return tensor
    return tensor[:: len(tensor) // _SAMPLED]
