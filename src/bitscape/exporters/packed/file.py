"""Packed files: a quantized network as one safetensors file, its weights as bit-packed codes; read back bit for bit.

For every quantized layer, in the form of compressed-tensors' "pack-quantized":

    <layer>.weight_packed  int32, codes q + 2^(b-1) as one stream of b-bit numbers (bits.py). 2-D: a row for each output
                           channel where its bits fill whole words, else one row; always ceil(weights * b / 32) words
    <layer>.weight_scale   float32, (output channels, 1) or (1,)
    <layer>.weight_shape   int64, the shape of the weight, output channels first

and every other tensor of the state dict (biases, norms, activation scales, buffers) as it is; of a product of two activations those of
both operands are scales of activations; what has several names is
stored under the first. The metadata has one entry, "bitscape" (header.py). Equal networks give equal bytes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitscape.errors import BitscapeError, nearest, prefixed
from bitscape.exporters.codes import StoredWeight, weight_codes
from bitscape.exporters.packed.bits import pack_bits, unpack_bits, words_of
from bitscape.exporters.packed.header import Header, StoredLayer, describe_input
from bitscape.files import check_safetensors_header, check_seal, sealed, write_atomic
from bitscape.models.dtypes import check_float32
from bitscape.models.find import load_state
from bitscape.models.layers import has_weight, layer_shapes, weight_layout, weighted_layers
from bitscape.models.modes import in_eval_mode
from bitscape.models.prepare import prepare
from bitscape.models.products import product_names, products, split_products
from bitscape.models.replace import replace_module
from bitscape.policy import LayerBits, Policy, fingerprint
from bitscape.quant.layers import QuantizedLayer, quantized_class, quantized_layers, require_float, require_quantized, static_bits
from bitscape.quant.quantizers.base import Codes
from bitscape.signatures import checked

_METADATA = "bitscape"  # one entry: safetensors writes several in random order
_WEIGHT_PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class PackedInfo:
    """What a packed file holds, measured on its tensors."""

    path: Path
    """The file."""
    file_bytes: int
    """Size of the file, header included."""
    weight_bytes: int
    """Packed codes and their scales: what `bitscape.cost` calls weight_bytes."""
    scale_bytes: int
    """Of it scales."""
    other_bytes: int
    """Biases, norms, activation scales, buffers, and the shapes of the weights."""


@torch.no_grad()
def save_packed(model: nn.Module, path: str | os.PathLike[str], *, policy: Policy | None = None) -> PackedInfo:
    """Write the quantized network `model` to `path`; a crash leaves the old file or the new one.

    Args:
        model: what `quantize` and `calibrate` returned, or `load_packed`; in any mode, on any device.
        path: the file, usually `.safetensors`; its folder must exist.
        policy: the policy the network was quantized with, to keep its cost and provenance in the file.

    Raises:
        PolicyError: a policy of another network.
        BitscapeError: no quantized layer, other bits than the policy's, a quantizer that no file can describe, or
            weights and scales that are not finite float32.
    """
    layers = require_quantized(model)
    if not any(getattr(layer.input_quantizer, "initialized", True) for layer in layers.values()):
        raise BitscapeError("model: no activation scale is set; call bitscape.quantize(model, policy, data), which sets them")
    stored, codes = {}, {}
    for name, layer in layers.items():
        with prefixed(f"layer {name}"):
            if not has_weight(layer):
                stored[name] = _stored_product(layer)
                continue
            codes[name] = weight_codes(layer)
            stored[name] = _stored_layer(layer, codes[name], _tied_to(layer, codes, layers))
    header = Header(policy=_checked_policy(model, policy), layers=stored)
    weights: dict[str, Tensor] = {}
    for name, code in codes.items():
        if stored[name].same_weight_as is None:
            weights |= _weight_tensors(name, code, static_bits(layers[name]).weight)
    others = _other_tensors(model)
    _check_ranges(others)
    # Copies: safetensors refuses views of one storage.
    tensors = {key: t.cpu().clone(memory_format=torch.contiguous_format) for key, t in (weights | others).items()}
    content = sealed(safetensors.torch.save(tensors, {_METADATA: header.to_json()}))
    write_atomic(path, content)
    packed, scales, _ = (sum(tensor.nbytes for key, tensor in weights.items() if key.endswith(part)) for part in _WEIGHT_PARTS)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return PackedInfo(Path(path), len(content), packed + scales, scales, total - packed - scales)


@checked
@torch.no_grad()
def load_packed(path: str | os.PathLike[str], float_model: nn.Module) -> nn.Module:
    """Return the network of a packed file, in eval mode, with the very outputs of the network that was saved.

    The weights are the dequantized codes and do not train (`requires_grad` is off); everything else may.

    Args:
        path: what `save_packed` wrote.
        float_model: the float network that was quantized, with any weights; it stays as it is, and its device is kept.
            Norms that were folded before saving may be folded in it or not.

    Raises:
        PolicyError: layers of another network, with the nearest names.
        BitscapeError: a file that is damaged, of another kind or another format; tensors that are missing, unknown or
            of another shape; scales that are not finite.
    """
    require_float(float_model, "float_model")
    check_float32(float_model, "float_model")
    header = read_header(path)
    with prefixed(os.fspath(path)):
        tensors = safetensors.torch.load_file(path)
        model = prepare(float_model)
        if not header.policy.layers.keys().isdisjoint(product_names(model)):
            model = split_products(model)
        header.policy.check(layer_shapes(model))
        layers = {name: layer for name, layer in weighted_layers(model).items() if not header.policy.layers[name].is_float}
        owned = {name: layer for name, layer in layers.items() if header.layers[name].same_weight_as is None}
        codes = {name: _stored_codes(name, tensors, header, layer) for name, layer in owned.items()}
        weights = {name: _dequantized(layer, codes[name]) for name, layer in owned.items()}
        for name, layer in layers.items():
            stored = header.layers[name]
            owner = stored.owner(name)
            _make_quantized(layer, weights[owner], codes[owner], header.policy.layers[name], stored)
        device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
        for name, product in products(model).items():
            if not header.policy.layers[name].is_float:
                _quantize_product(product, header.policy.layers[name], header.layers[name], device)
        _drop_folded_norms(model, tensors)
        _load_others(model, tensors)
    return in_eval_mode(model)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return what a packed file says of its network. Raises BitscapeError for a file that is damaged, of another kind or another format."""
    with prefixed(os.fspath(path)):
        if not Path(path).is_file():
            raise BitscapeError("no such file; give the path of a file of save_packed")
        try:
            check_safetensors_header(path)
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_METADATA)
        except (SafetensorError, ValueError) as error:
            raise BitscapeError(f"not a complete safetensors file ({error}); copy it again or write it anew") from error
        if text is None:
            raise BitscapeError("no packed file (another safetensors file); load float weights with load_weights, or --weights")
        header = Header.from_json(text)
        try:
            check_seal(Path(path).read_bytes())
        except ValueError as error:
            raise BitscapeError(f"{error}; copy it again or write it anew") from error
    return header


def _stored_layer(layer: QuantizedLayer, codes: Codes, tied_to: str | None) -> StoredLayer:
    scales = "channel" if codes.scale.ndim else "tensor"
    description = describe_input(layer.input_quantizer)
    return StoredLayer(zero_point=codes.zero_point, scales=scales, input=description, same_weight_as=tied_to)


def _stored_product(layer: QuantizedLayer) -> StoredLayer:
    first, second = map(describe_input, (layer.input_quantizer, layer.weight_quantizer))
    return StoredLayer(zero_point=0, scales="tensor", input=first, second=second)


def _tied_to(layer: QuantizedLayer, codes: Mapping[str, Codes], layers: Mapping[str, QuantizedLayer]) -> str | None:
    """The first of the earlier layers in `codes` with the same weight parameter and the same codes, if any."""
    *earlier, own = codes
    tied = (name for name in earlier if layers[name].weight is layer.weight and _same(codes[name], codes[own]))
    return next(tied, None)


def _same(a: Codes, b: Codes) -> bool:
    return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale) and a.zero_point == b.zero_point


def _checked_policy(model: nn.Module, policy: Policy | None) -> Policy:
    shapes = layer_shapes(model)
    bits = {name: static_bits(layer) for name, layer in quantized_layers(model).items()}
    own = Policy({**dict.fromkeys(shapes, LayerBits.FLOAT), **bits}, fingerprint(shapes))
    policy = own if policy is None else policy
    policy.check(shapes)
    for name, given, has in policy.difference(own):
        raise BitscapeError(f"policy: it gives {name} {given} bits, the network has {has}; pass the one it was made by")
    return policy


def _key(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _weight_tensors(name: str, codes: Codes, bits: int) -> dict[str, Tensor]:
    q = codes.layout.outputs_first(codes.q)
    unsigned = (q.short() + 2 ** (bits - 1)).to(torch.uint8).cpu().numpy()
    rows = len(q) if q[0].numel() * bits % 32 == 0 else 1
    words = torch.from_numpy(pack_bits(unsigned, bits)).reshape(rows, -1)
    scale = codes.scale.reshape(-1, 1) if codes.scale.ndim else codes.scale.reshape(1)
    parts = (words, scale, torch.tensor(q.shape, dtype=torch.int64))
    return {_key(name, part): tensor for part, tensor in zip(_WEIGHT_PARTS, parts, strict=True)}


def _other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what the codes replace; what has several names stands under the first."""
    layers = quantized_layers(model)
    every = {name for name, _ in model.named_modules(remove_duplicate=False)}
    repeated = every - {name for name, _ in model.named_modules()}
    skipped = repeated | {_key(name, "weight_quantizer") for name, layer in layers.items() if has_weight(layer)}
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        module, _, attribute = key.rpartition(".")
        if module in skipped or (module in layers and attribute == "weight") or id(value) in seen:
            continue
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise BitscapeError(f"model: {key} of its state dict is a {kind}; a packed file holds tensors only")
        kept[key] = value.detach()
        seen.add(id(value))
    return kept


def _check_ranges(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not {"input_quantizer", "weight_quantizer"}.isdisjoint(key.split(".")) and not torch.isfinite(tensor).all():
            raise BitscapeError(f"{key} is NaN or infinite; calibrate the network and save it again")


def _stored_codes(name: str, tensors: dict[str, Tensor], header: Header, layer: nn.Module) -> Codes:
    """Take the three tensors of a layer's weight out of `tensors`."""
    weight, bits = layer.get_parameter("weight"), header.policy.layers[name].weight
    keys = [_key(name, part) for part in _WEIGHT_PARTS]
    for key in keys:
        if key not in tensors:
            raise BitscapeError(f"tensor {key} is missing; write the file anew")
    words, scale, shape = (tensors.pop(key) for key in keys)
    layout = weight_layout(layer)
    stored_shape, scales = layout.outputs_first(weight).shape, weight.shape[layout.scale_axis]
    _expect(keys[2], shape.tolist(), list(stored_shape))
    _expect(keys[0], (words.numel(), words.dtype), (words_of(weight.numel(), bits), torch.int32))
    per_channel = header.layers[name].scales == "channel"
    _expect(keys[1], (*scale.shape, scale.dtype), (*((scales, 1) if per_channel else (1,)), torch.float32))
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise BitscapeError(f"{keys[1]} holds values that are NaN, infinite or not positive; write the file anew")
    unsigned = torch.from_numpy(unpack_bits(words.numpy(), bits, weight.numel()))
    q = layout.outputs_first((unsigned.short() - 2 ** (bits - 1)).to(torch.int8).reshape(stored_shape)).contiguous()
    scale = layout.along_scales(scale, weight.ndim) if per_channel else scale.reshape(())
    return Codes(q.to(weight.device), scale.to(weight.device), header.layers[name].zero_point, layout)


def _expect(key: str, found: object, expected: object) -> None:
    if found != expected:
        advice = "build the network as the saved one was built"
        raise BitscapeError(f"{key} is {found}, the network needs {expected}; {advice}")


def _dequantized(layer: nn.Module, codes: Codes) -> nn.Parameter:
    # In the memory format of the float weight: with channels_last other kernels run, and sum in another order.
    weight = torch.empty_like(layer.get_parameter("weight"), dtype=torch.float32)
    return nn.Parameter(weight.copy_(codes.dequantize()), requires_grad=False)


def _make_quantized(layer: nn.Module, weight: nn.Parameter, codes: Codes, bits: LayerBits, stored: StoredLayer) -> None:
    layer.__class__ = quantized_class(type(layer))
    layer.weight = weight
    layer.weight_quantizer = StoredWeight(bits.weight, codes.scale, codes.zero_point)
    layer.input_quantizer = stored.input_quantizer(bits.activation).to(weight.device)


def _quantize_product(product: nn.Module, bits: LayerBits, stored: StoredLayer, device: torch.device) -> None:
    product.__class__ = quantized_class(type(product))
    product.weight_quantizer = stored.second_quantizer(bits.weight).to(device)
    product.input_quantizer = stored.input_quantizer(bits.activation).to(device)


def _drop_folded_norms(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Drop the norms that the saved network had folded, and give their layers the biases.

    A folded norm leaves no tensor in the file, and a bias in its layer. Files with other gaps are
    left to `_load_others`, which names them.
    """
    norms = [module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and _is_absent(name, module, tensors)]
    biases = {name: tensors[key] for name in weighted_layers(model) if (key := _key(name, "bias")) in tensors}
    layers = {name: layer for name, layer in weighted_layers(model).items() if name in biases and layer.bias is None}
    if not len(layers) <= len(norms) <= len(biases):
        return
    for norm in norms:
        replace_module(model, norm, nn.Identity())
    for name, layer in layers.items():
        layer.bias = nn.Parameter(torch.empty_like(biases[name], device=layer.get_parameter("weight").device))


def _is_absent(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    keys = [_key(name, key) for key in module.state_dict()]
    return bool(keys) and not any(key in tensors for key in keys)


def _load_others(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = _other_tensors(model)
    advice = "build the network as the saved one was built"
    for key in [key for key in expected if key not in tensors]:
        raise BitscapeError(f"tensor {key} of float_model is missing{nearest(key, tensors)}; {advice}")
    for key, tensor in tensors.items():
        if key not in expected:
            raise BitscapeError(f"float_model has no tensor {key}{nearest(key, expected)}; {advice}")
        _expect(key, (*tensor.shape, tensor.dtype), (*expected[key].shape, expected[key].dtype))
    _check_ranges(tensors)
    load_state(model, tensors, strict=False)
