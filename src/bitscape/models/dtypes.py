"""The types that networks and images must have, checked at the door."""

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from bitscape.calling import sample_count
from bitscape.errors import BitscapeError
from bitscape.nested import tensors_by_path

_BESIDE_IMAGES = (torch.float32, torch.int64, torch.int32, torch.bool)
"""Types of the tensors that a network of several inputs is called with."""


def check_module(model: object, argument: str = "model") -> None:
    """Raise BitscapeError unless `model` is a network made of modules that can be seen."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise BitscapeError(f"{argument}: {kind} where a network is needed; give a torch.nn.Module")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise BitscapeError(f"{argument}: torch.jit scripted or traced it, which hides its layers; give the network itself")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise BitscapeError(
                f"{argument}: {name} has no values yet, as in a LazyConv2d before its first batch; "
                "call the network on a batch once"
            )


def check_float32(model: nn.Module, argument: str = "model") -> None:
    """Raise BitscapeError unless every floating-point parameter of `model` is float32.

    Scales, codes and exported files are float32. A network may well autocast within its forward.
    """
    check_module(model, argument)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise BitscapeError(
                f"{argument}: parameter {name} is {parameter.dtype}; the network must be float32: call {argument}.float() first"
            )


def check_images(images: object, argument: str = "images", *, model: nn.Module | None = None) -> None:
    """Raise BitscapeError unless `images` is a float32 tensor (n, ...) of one image or more, on any device.

    A `model` with an nn.Embedding may take int64 indices too.
    """
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise BitscapeError(f"{argument}: a {kind} where a tensor is needed; give float32 tensors (n, c, h, w), without labels")
    indexes = model is not None and takes_indices(model) and images.dtype == torch.int64
    if images.dtype != torch.float32 and not indexes:
        advice = (
            f"call {argument}.float()"
            if images.is_floating_point()
            else f"normalize them for the network (Normalization.apply makes them from uint8, {argument}.float() changes the type alone)"
        )
        raise BitscapeError(f"{argument}: {images.dtype}; give a float32 tensor: {advice}")
    if not images.ndim or not images.numel():
        raise BitscapeError(f"{argument}: shape {tuple(images.shape)}; give at least one image as (n, ...), most often (n, c, h, w)")


def check_inputs(inputs: object, argument: str = "images", *, model: nn.Module | None = None) -> None:
    """Raise BitscapeError unless `inputs` are what a float32 network can be called with.

    An only tensor is as `check_images` says. Of several, one at least is float32 with a batch dimension, or the
    `model` has an nn.Embedding; the others may be indices (int64, int32) and masks (bool), with or without one.
    """
    tensors = {path: tensor for path, tensor in tensors_by_path(inputs)}
    if len(tensors) < 2:
        check_images(next(iter(tensors.values()), inputs), argument, model=model)
        return
    for path, tensor in tensors.items():
        if tensor.dtype not in _BESIDE_IMAGES:
            name = argument + "".join(f"[{key!r}]" for key in path)
            raise BitscapeError(
                f"{name}: {tensor.dtype}; give float32 values, int64 or int32 indices, or bool masks: call .float(), or normalize images"
            )
    if not any(tensor.dtype == torch.float32 for tensor in tensors.values()) and not (model is not None and takes_indices(model)):
        kinds = ", ".join(str(tensor.dtype) for tensor in tensors.values())
        raise BitscapeError(f"{argument}: {kinds}; give at least one float32 tensor")
    if not sample_count(inputs):
        raise BitscapeError(f"{argument}: a batch of no sample; give at least one")


def takes_indices(model: nn.Module) -> bool:
    """Whether `model`, which may be a traced graph, looks rows up in a table by int64 indices in place of images."""
    return any(isinstance(module, nn.Embedding) or _looks_up(module) for module in model.modules())


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) and any(node.target is torch.ops.aten.embedding.default for node in module.graph.nodes)
