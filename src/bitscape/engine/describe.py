"""Settings as plain JSON data, so that a run can be told from another one."""

import enum
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
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
    """Return `value` as JSON data: dataclasses as their fields, tensors and networks as shapes and hashes."""
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
    return getattr(value, "__qualname__", type(value).__qualname__)


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
