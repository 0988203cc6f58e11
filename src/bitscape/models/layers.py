"""Which layers of a network can be quantized, what they are called, and what weights they have."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from bitscape.errors import BitscapeError
from bitscape.models.attention import reads_weights, split_attention
from bitscape.models.meta import meta_copy
from bitscape.models.products import MatMul

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Convolutions whose weight is (inputs, outputs of a group, *kernel); of all other layers it is (outputs, inputs of a group, *kernel)."""
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
"""Layer types that multiply their input with a weight."""
QUANTIZABLE = (*WEIGHTED, MatMul)
"""Layer types that take bits; their subclasses count too. A MatMul has no weight: its second operand takes those of the weight."""
KINDS = "convolution (Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d), Linear or bitscape MatMul"
"""The same in words, for messages."""


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
            if has_weight(module):
                _refuse_unshaped(name, module)
                _refuse_computed(name, module)
            found[name] = module
    return found


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return layer name -> shape of its weight, for every quantizable layer; attention is split as everywhere (`split_attention`).

    A product of two activations has none, (0,).
    """
    if reads_weights(model):
        model = split_attention(meta_copy(model))
    return {name: weight_shape(layer) for name, layer in quantizable_layers(model).items()}


def has_weight(layer: nn.Module) -> bool:
    """Whether a quantizable layer multiplies its input with a weight, not with another activation."""
    return not isinstance(layer, MatMul)


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The `quantizable_layers` that have a weight."""
    return {name: layer for name, layer in quantizable_layers(model).items() if has_weight(layer)}


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of a quantizable layer's weight; (0,) without one."""
    return tuple(layer.get_parameter("weight").shape) if has_weight(layer) else (0,)


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for a linear layer, whatever attributes it has."""
    return int(layer.groups) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else 1


def output_channels(layer: nn.Module) -> int:
    """Output channels of a convolution, output features of a linear layer."""
    weight = layer.get_parameter("weight")
    return weight.shape[1] * groups_of(layer) if isinstance(layer, TRANSPOSED) else weight.shape[0]


def channel_axis(layer: nn.Module, output: Tensor) -> int:
    """Dimension of a layer's output along which its channels lie."""
    return output.ndim - 1 if isinstance(layer, nn.Linear) else 1


def input_channels(layer: nn.Module) -> int:
    """Input channels of a convolution, input features of a linear layer."""
    weight = layer.get_parameter("weight")
    return weight.shape[0] if isinstance(layer, TRANSPOSED) else weight.shape[1] * groups_of(layer)


@dataclass(frozen=True)
class WeightLayout:
    """Where the outputs of a layer lie in its weight."""

    scale_axis: int = 0
    """Dimension along which scales lie, one for each index."""
    transposed_groups: int = 0
    """Groups of a transposed convolution; 0 for every other layer."""

    def outputs_first(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (outputs, inputs of a group, *kernel); applied again, in the weight's layout."""
        if not self.transposed_groups:
            return weight
        turned: Tensor = weight.unflatten(0, (self.transposed_groups, -1)).transpose(1, 2).flatten(0, 1)
        return turned

    def along_scales(self, values: Tensor, ndim: int) -> Tensor:
        """One value for each scale, to broadcast against a weight of `ndim` dimensions."""
        return values.reshape(*[1] * self.scale_axis, -1, *[1] * (ndim - 1 - self.scale_axis))

    def of_outputs(self, values: Tensor, outputs: int) -> Tensor:
        """One value for each scale as one for each of the `outputs`, (outputs,): groups may share scales."""
        repeats = outputs // len(values)
        return values.repeat(repeats) if self.scale_axis else values.repeat_interleave(repeats)

    def largest(self, values: Tensor, scales: int) -> Tensor:
        """The largest of the values, one for each output, that share each of the `scales`, (scales,)."""
        return values.reshape(-1, scales).amax(0) if self.scale_axis else values.reshape(scales, -1).amax(1)


PLAIN = WeightLayout()
"""Of layers whose weight has its outputs first."""


def weight_layout(layer: nn.Module) -> WeightLayout:
    """The layout of a layer's weight.

    The weight of a transposed convolution has no dimension of all outputs: its groups share their scales, unless each
    input is a group (depthwise), which then has its own.
    """
    if not isinstance(layer, TRANSPOSED):
        return PLAIN
    depthwise = 1 < layer.groups == layer.in_channels
    return WeightLayout(scale_axis=0 if depthwise else 1, transposed_groups=layer.groups)


def scale_axis(layer: nn.Module) -> int:
    """Dimension of the weight along which its scales lie: that of the output channels, as far as it has one (`weight_layout`)."""
    return weight_layout(layer).scale_axis


def outputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as (outputs, inputs of a group, *kernel), whatever the layer; applied again, the weight's layout."""
    return weight_layout(layer).outputs_first(weight)


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
