"""Attention whose projections are layers that are called, so that their weights and inputs can take bits.

`nn.MultiheadAttention` keeps one bare parameter for the query, key and value projections and reads `out_proj.weight`
without calling `out_proj`: a layer put in its place never runs. `split_attention` swaps the module; outputs stay equal.
The attention of torchvision's Swin, and of timm's SwinV2, BEiT and EVA, hands the weights of its layers to functions: it
is made to call the layers.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitscape.errors import BitscapeError
from bitscape.models.derived import forward_within
from bitscape.models.replace import replace_module

_log = logging.getLogger("bitscape.models")


_READ_WEIGHTS = {
    "torchvision.models.swin_transformer": True,
    "timm.models.swin_transformer_v2": False,
    "timm.models.beit": False,
    "timm.models.eva": False,
}
"""Modules of Python whose attention hands the weights of its layers to functions -> whether it never calls a layer itself."""


class SplitAttention(nn.Module):
    """Multi-head attention with the layers `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    Built from the nn.MultiheadAttention that it replaces: same arguments of `forward`, same outputs, and the state
    dict of the original loads too. Vaswani et al., 2017, arXiv 1706.03762, section 3.2.2.
    """

    # nn.TransformerEncoderLayer and nn.TransformerEncoder read these two before they take a fused path that would
    # bypass the four layers.
    in_proj_bias: None = None
    _qkv_same_embed_dim: bool = False

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        if original.bias_k is not None or original.add_zero_attn:
            option = "add_bias_kv" if original.bias_k is not None else "add_zero_attn"
            raise BitscapeError(f"model: nn.MultiheadAttention with {option}=True cannot be split; build it with {option}=False")
        self.embed_dim = original.embed_dim
        self.num_heads = original.num_heads
        self.head_dim = original.head_dim
        self.dropout = original.dropout
        self.batch_first = original.batch_first
        weights, biases = _projections(original)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(original.out_proj.weight, original.out_proj.bias)
        self.register_load_state_dict_pre_hook(_rename_projections)  # type: ignore[no-untyped-call]  # torch's
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, shaped like `query`, and the attention weights or None.

        query is (n, l, e) if batch_first, (l, n, e) if not, (l, e) for one sample; key and value likewise with s for l.
        key_padding_mask is (n, s), attn_mask (l, s) or (n * heads, l, s); both boolean (True = ignore) or added floats.
        Weights are (n, l, s), or (n, heads, l, s) when not averaged. `is_causal` is a hint about `attn_mask` and not
        used, but BitscapeError without one.
        """
        if is_causal and attn_mask is None:
            raise BitscapeError("is_causal: True without attn_mask; pass the causal mask as attn_mask")
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = _joined_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            heads, weights = self._attend(q, k, v, mask, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
        """Return softmax(q k' / sqrt(d)) v and the softmax itself: Eq. 1. Its products may be modules (`models.products`)."""
        scores = getattr(self, "scores", torch.matmul)(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
        return getattr(self, "values", torch.matmul)(weights, v), weights

    def _heads(self, x: Tensor) -> Tensor:
        """Return any of the three input layouts as (n, heads, length, head_dim)."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def split_attention(model: nn.Module) -> nn.Module:
    """Replace every nn.MultiheadAttention of `model` by a SplitAttention, in place, and return the model.

    Attention of torchvision and timm that reads its layers' weights is changed so that it calls the layers. When `model`
    is itself an nn.MultiheadAttention, its replacement is returned. A second call changes nothing. Subclasses of
    nn.MultiheadAttention may compute something else: they are left as they are, and logged. The projections become
    new parameters, so build optimizers afterwards. Raises BitscapeError for add_bias_kv and add_zero_attn.
    """
    if type(model) is nn.MultiheadAttention:
        return SplitAttention(model)
    splits = [(m, SplitAttention(m)) for m in model.modules() if type(m) is nn.MultiheadAttention]
    for original, split in splits:
        replace_module(model, original, split)
    for name, module in model.named_modules():
        if _reads_weights(module):
            module.__class__ = forward_within(cast(Any, type(module)), _layers_called)
        if isinstance(module, nn.MultiheadAttention):
            _log.warning("%s: %s is no plain nn.MultiheadAttention and stays float", name, type(module).__name__)
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, SplitAttention) for m in module.modules()):
            module.use_nested_tensor = False
    return model


def reads_weights(model: nn.Module) -> bool:
    """Whether `model` has attention that reads the weights of its layers, which `split_attention` would change."""
    return any(type(module) is nn.MultiheadAttention or _reads_weights(module) for module in model.modules())


def _reads_weights(module: nn.Module) -> bool:
    return type(module).__module__ in _READ_WEIGHTS and "Attention" in type(module).__name__


def _projections(original: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Return the weights and biases of query, key and value."""
    if original.in_proj_weight is None:
        parts = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
        weights = tuple(weight for weight in parts if weight is not None)
    else:
        weights = original.in_proj_weight.chunk(3)
    bias = original.in_proj_bias
    return weights, (None, None, None) if bias is None else bias.chunk(3)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # On the meta device the throw-away initialization draws no random numbers.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _rename_projections(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn the projection keys of nn.MultiheadAttention into those of the four layers, before they are loaded."""
    for kind in ("weight", "bias"):
        packed = state.pop(f"{prefix}in_proj_{kind}", None)
        if packed is not None:
            state.update(_named(prefix, kind, packed.chunk(3)))
    for letter in "qkv":
        weight = state.pop(f"{prefix}{letter}_proj_weight", None)
        if weight is not None:
            state[f"{prefix}{letter}_proj.weight"] = weight


def _named(prefix: str, kind: str, parts: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    return {f"{prefix}{letter}_proj.{kind}": part for letter, part in zip("qkv", parts, strict=True)}


def _joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the sum of both masks, to be added to scores of shape (n, heads, l, s), or None."""
    n, heads = q.shape[:2]
    masks = []
    if attn_mask is not None:
        shape = (n, heads, *attn_mask.shape[-2:]) if attn_mask.dim() == 3 else attn_mask.shape
        masks.append(_additive(attn_mask, q.dtype).reshape(shape))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, q.dtype).reshape(n, 1, 1, -1))
    return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


class _LayersCalled(TorchFunctionMode):
    """Where a function multiplies by the weight of one of `layers`, the layer is called instead; not where the layer itself does so."""

    def __init__(self, layers: Iterable[nn.Module], never_called: bool) -> None:
        super().__init__()
        self.layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.never_called = never_called

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **(kwargs or {}))
            layer = next((layer for layer in self.layers if weight is layer.weight), None)
            if layer is not None and (self.never_called or bias is not layer.bias):
                return _with_bias(layer, x, bias)
        return func(*args, **(kwargs or {}))


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _with_bias(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer makes of `x`, with another bias than its own."""
    output: Tensor = layer(x)
    if bias is layer.bias:
        return output
    difference = (0 if bias is None else bias) - (0 if layer.bias is None else layer.bias)
    return output + difference


def _layers_called(module: nn.Module) -> _LayersCalled:
    """Within it, the forward of attention calls the layers whose weights it reads."""
    never_called = next(_READ_WEIGHTS[k.__module__] for k in type(module).__mro__ if k.__module__ in _READ_WEIGHTS)
    return _LayersCalled(module.children(), never_called)
