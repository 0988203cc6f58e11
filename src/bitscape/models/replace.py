"""Putting another module in the place of one, wherever a network holds it."""

from torch import nn

from bitscape.errors import BitscapeError


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place of `model` where `old` is registered, so that a shared layer stays shared.

    Raises BitscapeError when `old` is `model` itself or is registered nowhere in it.
    """
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    if not places:
        kind = type(old).__name__
        reason = "is the model itself" if old is model else "is registered nowhere in the model"
        raise BitscapeError(f"old: this {kind} {reason}; pass a submodule, e.g. a value of quantizable_layers(model)")
    for parent, name in places:
        setattr(parent, name, new)
