"""Which layers of a network can be quantized, what they are called, and how to put another in their place."""

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from bitscape.errors import BitscapeError

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layer types that take bits; their subclasses count too."""


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> layer in registration order.

    A layer reachable by several names appears once, under its first name. The `out_proj` of an
    `nn.MultiheadAttention` is left out: torch reads its weight and never calls it (see `split_attention`).
    Raises BitscapeError for a lazy layer that has seen no input yet, because its shape is unknown.
    """
    never_called = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE) and id(module) not in never_called:
            _refuse_unshaped(name, module)
            found[name] = module
    return found


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return layer name -> shape of its weight, for every quantizable layer."""
    return {name: tuple(layer.get_parameter("weight").shape) for name, layer in quantizable_layers(model).items()}


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


def _refuse_unshaped(name: str, module: nn.Module) -> None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        kind = type(module).__name__
        raise BitscapeError(f"model: layer {name!r} ({kind}) has no shape yet; run one forward pass on an image first")
