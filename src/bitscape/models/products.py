"""Products of two activations, such as those of attention, as modules that can take bits.

A network of yours calls `MatMul` where it would call torch.matmul. For attention that exists already, `split_products` has
its two products, query by key ("scores") and weights by value ("values"), computed by modules of these names within it.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitscape.errors import BitscapeError
from bitscape.models.attention import SplitAttention

SCORES, VALUES = "scores", "values"
"""Names of the two products within a module of attention."""


class MatMul(nn.Module):
    """torch.matmul(a, b) as a layer without weight.

    Of its `LayerBits`, `weight` is the width of the second operand, and `activation` that of the first.
    """

    weight: None = None
    bias: None = None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of a (..., l, d) and b (..., d, s)."""
        return torch.matmul(a, b)


def products(model: nn.Module) -> dict[str, MatMul]:
    """Name -> product of two activations, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MatMul)}


def refuse_products(model: nn.Module, what: str) -> None:
    """Raise BitscapeError where the network has products of two activations, which `what` does not take."""
    if found := products(model):
        names = ", ".join(found)
        raise BitscapeError(f"model: {what} does not take products of two activations ({names}); leave them float, or search by fisher")


def product_names(model: nn.Module) -> list[str]:
    """Names of the products that `split_products` would add."""
    return [f"{name}.{part}".lstrip(".") for name, _ in _attention(model) for part in (SCORES, VALUES)]


def split_products(model: nn.Module) -> nn.Module:
    """Let attention of `model` compute its products by `MatMul` modules, in place; outputs stay equal up to rounding.

    That is attention split by `split_attention`, and every module whose own forward calls
    F.scaled_dot_product_attention. A second call changes nothing.
    """
    for _, module in list(_attention(model)):
        module.add_module(SCORES, MatMul())
        module.add_module(VALUES, MatMul())
        module.__class__ = _multiplying(cast(Any, type(module)))
    return model


def _attention(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules of attention whose products are no modules yet."""
    for name, module in model.named_modules():
        called = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
        calls_attention = isinstance(module, SplitAttention) or F.scaled_dot_product_attention.__name__ in called
        if calls_attention and not isinstance(getattr(module, SCORES, None), MatMul):
            yield name, module


class _ProductsCalled(TorchFunctionMode):
    """Attention computed in one function is computed by the two products of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.scores, self.values = module.get_submodule(SCORES), module.get_submodule(VALUES)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(self.scores, self.values, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attend(
    scores: Callable[[Tensor, Tensor], Tensor],
    values: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention with its two products computed by `scores` and `values`."""
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    weights = scores(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if attn_mask is not None:
        below = float("-inf")
        weights = weights.masked_fill(~attn_mask, below) if attn_mask.dtype == torch.bool else weights + attn_mask
    return values(F.dropout(weights.softmax(dim=-1), dropout_p), value)


@cache
def _multiplying(kind: Any) -> Any:
    """The class whose attention calls its products."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _ProductsCalled(self):
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})
