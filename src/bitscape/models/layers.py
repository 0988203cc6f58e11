"""Which layers of a network can be quantized, what they are called, and what weights they have."""

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from bitscape.errors import BitscapeError
from bitscape.models.attention import reads_weights, split_attention
from bitscape.models.meta import meta_copy

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layer types that take bits; their subclasses count too."""


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> layer in registration order.

    A layer reachable by several names appears once, under its first name. The `out_proj` of an
    `nn.MultiheadAttention` is left out: torch reads its weight and never calls it (see `split_attention`).
    Raises BitscapeError for a lazy layer that has seen no input yet, because its shape is unknown, and for a layer whose weight or
    bias is computed (pruned, weight_norm, spectral_norm, parametrized).
    """
    never_called = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE) and id(module) not in never_called:
            _refuse_unshaped(name, module)
            _refuse_computed(name, module)
            found[name] = module
    return found


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return layer name -> shape of its weight, for every quantizable layer; attention is split as everywhere (`split_attention`)."""
    if reads_weights(model):
        model = split_attention(meta_copy(model))
    return {name: tuple(layer.get_parameter("weight").shape) for name, layer in quantizable_layers(model).items()}


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for a linear layer, whatever attributes it has."""
    return layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1


def _refuse_unshaped(name: str, module: nn.Module) -> None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        kind = type(module).__name__
        raise BitscapeError(f"model: layer {name!r} ({kind}) has no shape yet; run one forward pass on an image first")


def _refuse_computed(name: str, layer: nn.Module) -> None:
    """A quantizer needs the parameter itself: what is computed anew in every pass has none."""
    for tensor in ("weight", "bias"):
        stored = tensor in layer._parameters or (tensor == "bias" and not _is_computed_bias(layer))
        if not stored:
            raise BitscapeError(
                f"model: the {tensor} of layer {name!r} is computed, or no parameter: bits are given to stored weights. "
                f"Make it one first, with {_way_to_store(layer, tensor)}"
            )


def _is_computed_bias(layer: nn.Module) -> bool:
    return "bias" not in layer._buffers and isinstance(getattr(layer, "bias", None), Tensor)


def _way_to_store(layer: nn.Module, tensor: str) -> str:
    if parametrize.is_parametrized(layer, tensor):
        return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})"
    stored = {key for key, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))}
    if f"{tensor}_mask" in stored:
        return f"torch.nn.utils.prune.remove(layer, {tensor!r})"
    if f"{tensor}_g" in stored:
        return f"torch.nn.utils.remove_weight_norm(layer, {tensor!r})"
    if f"{tensor}_u" in stored:
        return f"torch.nn.utils.remove_spectral_norm(layer, {tensor!r})"
    return f"layer.{tensor} = torch.nn.Parameter(...)"
