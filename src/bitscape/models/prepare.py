"""The one preparation of a user's network: what cannot take bits is refused by name, and attention is split.

Every public function that works on a network's layers starts here, so that a policy found by one of
them fits all of them.
"""

from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.attention import reads_weights, split_attention
from bitscape.models.copies import copied
from bitscape.models.dtypes import check_module
from bitscape.models.layers import quantizable_layers
from bitscape.models.products import split_products


def prepare(model: nn.Module, *, inplace: bool = False, attention_products: bool = False) -> nn.Module:
    """Return a copy of `model` in which attention is split into layers; modes stay as they are.

    A prepared network may be prepared again, and is then only copied.

    Args:
        model: any network.
        inplace: change `model` itself.
        attention_products: let the products of attention take bits too (`models.products`).

    Raises:
        BitscapeError: what `check_layers` refuses, or a network that cannot be copied.
    """
    check_layers(model)
    prepared = split_attention(model if inplace else copied(model))
    return split_products(prepared) if attention_products else prepared


def as_prepared(model: nn.Module) -> nn.Module:
    """Return `model` itself where `prepare` would change nothing, else a prepared copy: for reading only."""
    check_layers(model)
    return prepare(model) if reads_weights(model) else model


def check_layers(model: nn.Module) -> None:
    """Raise BitscapeError for a layer that could not take bits as it is, naming it.

    That is a lazy layer without a shape, a computed weight, or a `forward` that was set on the layer
    itself: quantizing changes a layer's class, which that `forward` would hide. What torch.compile
    returned is refused too: its layers have other names.
    """
    check_module(model)
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        raise BitscapeError("model: it is compiled by torch.compile; give the network that was compiled, and compile afterwards")
    for name, layer in quantizable_layers(model).items():
        if "forward" in vars(layer):
            raise BitscapeError(
                f"model: layer {name!r} has a forward of its own, set on the instance (as hooks of accelerate do), so it would "
                "stay float; remove it (accelerate.hooks.remove_hook_from_module(model, recurse=True), or del layer.forward), "
                "or make it a subclass with that forward"
            )
