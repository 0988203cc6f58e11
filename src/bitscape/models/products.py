"""Products of two activations, such as those of attention, as modules that can take bits.

A network of yours calls `MatMul` where it would call torch.matmul. For attention that exists already, `split_products` has
its two products, query by key ("scores") and weights by value ("values"), computed by modules of these names within it;
where the module uses a name itself, the product is called "scores_product" or "values_product".
"""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitscape.errors import BitscapeError
from bitscape.models.attention import SplitAttention
from bitscape.models.calls import code_of_forward, stored_attributes
from bitscape.models.derived import forward_within

SCORES, VALUES = "scores", "values"
"""Names of the two products within a module of attention that uses neither itself."""
_NAMES = "_names_of_products"


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
    return [f"{name}.{part}".lstrip(".") for name, module in _attention(model) for part in _names_in(module)]


def split_products(model: nn.Module) -> nn.Module:
    """Let attention of `model` compute its products by `MatMul` modules, in place; outputs stay equal up to rounding.

    That is attention split by `split_attention`, and every module whose forward calls F.scaled_dot_product_attention, in
    methods and functions that it calls too. A second call changes nothing.

    Raises:
        BitscapeError: no product of two activations in the network then.
    """
    for _, module in list(_attention(model)):
        names = _names_in(module)
        for name in names:
            module.add_module(name, MatMul())
        setattr(module, _NAMES, names)
        module.__class__ = forward_within(cast(Any, type(module)), _ProductsCalled)
    if not products(model):
        raise BitscapeError(
            "attention_products=True: no module of the network calls F.scaled_dot_product_attention in its forward, or in what "
            "that calls; call bitscape.models.products.MatMul in the place of torch.matmul (docs/extending.md), or leave it out"
        )
    return model


def _attention(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules of attention whose products are no modules yet, nn.MultiheadAttention that is to be split among them."""
    for name, module in model.named_modules():
        split = isinstance(module, SplitAttention) or type(module) is nn.MultiheadAttention
        if (split or _calls_attention(module)) and _NAMES not in vars(module):
            yield name, module


def _calls_attention(module: nn.Module) -> bool:
    return any(F.scaled_dot_product_attention.__name__ in code.co_names for code in code_of_forward(cast(Any, type(module))))


def _names_in(module: nn.Module) -> tuple[str, str]:
    """Names of the two products within a module of attention: such as it doesn't use itself."""
    stored = stored_attributes(code_of_forward(cast(Any, type(module))))
    scores, values = (_unused(name, module, stored) for name in (SCORES, VALUES))
    return scores, values


def _unused(name: str, module: nn.Module, stored: Set[str]) -> str:
    while name in stored or hasattr(module, name):
        name = f"{name}_product"
    return name


class _ProductsCalled(TorchFunctionMode):
    """Attention computed in one function is computed by the two products of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.scores, self.values = map(module.get_submodule, getattr(module, _NAMES))

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
