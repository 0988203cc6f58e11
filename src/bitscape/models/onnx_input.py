"""A network from an ONNX file, for users who have no source code of it."""

import copy
import keyword
import operator
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from bitscape.errors import BitscapeError, first_line, needs_extra

if TYPE_CHECKING:
    import onnx


def read_onnx(path: Path | str) -> nn.Module:
    """Return the network of an ONNX file as an `nn.Module` in eval mode, through onnx2torch (extra `onnx-input`).

    Layers are called as the file's nodes, arguments as its inputs. A file with several outputs gives a mapping from their
    names to tensors, one with a single output the tensor alone.

    Raises:
        BitscapeError: no ONNX file at `path`, or an operator that onnx2torch does not convert (named).
    """
    from bitscape.models.find import import_torchvision

    with needs_extra("onnx-input"):
        import onnx

        import_torchvision()  # onnx2torch imports it
        import onnx2torch
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and onnx raise many kinds
        raise BitscapeError(f"{path}: no readable ONNX file ({first_line(error)})") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the converter's own tensors
            network = onnx2torch.convert(_for_any_batch(_without_constants(model)))
    except Exception as error:
        raise BitscapeError(
            f"{path}: onnx2torch cannot convert it ({first_line(error)}); export the network from its source, "
            "or simplify the file with onnxsim first"
        ) from error
    named = _with_linear_layers(_with_names_of(model, network))
    return _with_fixed_sizes(_with_fixed_slices(_with_fixed_scales(named))).eval()


def _without_constants(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return a copy whose Constant nodes are initializers: onnx2torch reads shapes and axes only from these."""
    from onnx import helper, numpy_helper

    changed = copy.deepcopy(model)
    graph = changed.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        attribute = node.attribute[0]
        value = helper.get_attribute_value(attribute)
        tensor = value if attribute.name == "value" else numpy_helper.from_array(_array(value, attribute.name))
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    return changed


def _for_any_batch(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Let a network that was written for one sample take several: reshapes to (1, ...) keep the first size of what they get.

    For one sample that is the same, as only values whose first size is 1 are meant. Written in place.
    """
    from onnx import numpy_helper, shape_inference

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in stored]
    if not all(_first_size(entry) == 1 for entry in inputs):
        return model
    inferred = shape_inference.infer_shapes(model).graph
    of_one = {entry.name for entry in (*inferred.value_info, *inputs) if _first_size(entry) == 1}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[0] in of_one and node.input[1] in stored:
            sizes = numpy_helper.to_array(stored[node.input[1]])
            if len(sizes) > 1 and sizes[0] == 1:
                kept = numpy_helper.from_array(np.array([0, *sizes[1:]]), f"{node.input[1]}, any batch, {node.name}")
                graph.initializer.append(kept)
                node.input[1] = kept.name
    return model


def _first_size(entry: "onnx.ValueInfoProto") -> int | None:
    sizes = entry.type.tensor_type.shape.dim
    return sizes[0].dim_value if sizes else None


def _array(value: object, attribute: str) -> NDArray[Any]:
    return np.array(value, dtype=np.float32 if "float" in attribute else np.int64)


def _with_names_of(model: "onnx.ModelProto", network: fx.GraphModule) -> fx.GraphModule:
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry.name for entry in model.graph.input if entry.name not in stored]
    placeholders = [node for node in network.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, inputs, strict=True):
        if name.isidentifier() and not keyword.iskeyword(name):
            node.target = name
    if len(model.graph.output) > 1:
        (output,) = (node for node in network.graph.nodes if node.op == "output")
        names = [entry.name for entry in model.graph.output]
        output.args = (dict(zip(names, output.args[0], strict=True)),)
    network.recompile()
    return network


def _with_linear_layers(network: fx.GraphModule) -> fx.GraphModule:
    """Let products with a stored matrix, and the stored vector added to them, be linear layers, which take bits."""
    graph, modules = network.graph, dict(network.named_modules())
    for node in [node for node in graph.nodes if _kind(modules, node) == "OnnxMatMul"]:
        matrix = _stored_tensor(modules, node.args[1])
        if matrix is None or matrix.ndim != 2 or not matrix.is_floating_point():
            continue
        added, bias = next(iter(node.users)), None
        if len(node.users) == 1 and _is_addition(modules, added) and added.args[0] is node:
            vector = _stored_tensor(modules, added.args[1])
            bias = vector if vector is not None and vector.shape == matrix.shape[1:] else None
        layer = nn.Linear(matrix.shape[0], matrix.shape[1], bias=bias is not None)
        with torch.no_grad():
            layer.weight.copy_(matrix.T)
            if bias is not None:
                layer.bias.copy_(bias)
        network.set_submodule(str(node.target), layer)
        node.args = node.args[:1]
        if bias is not None:
            added.replace_all_uses_with(node)
            graph.erase_node(added)
    graph.eliminate_dead_code()
    network.recompile()
    return network


def _is_addition(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    if _kind(modules, node) != "OnnxBinaryMathOperation":
        return False
    return getattr(modules[str(node.target)], "math_op_function", None) is torch.add


def _with_fixed_sizes(network: fx.GraphModule) -> fx.GraphModule:
    """Let reshapes take their sizes as numbers: torch.export follows no sizes that are read from a tensor."""
    graph, modules = network.graph, dict(network.named_modules())
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        if type(modules[node.target]).__name__ != "OnnxReshape":
            continue
        with graph.inserting_before(node):
            sizes = _sizes(graph, modules, node.args[1])
            if sizes is None:
                continue
            # 0 stands for the size as it is.
            shape = tuple(
                graph.call_method("size", (node.args[0], axis)) if size == 0 else size
                for axis, size in enumerate(sizes)
            )
            fixed = graph.call_function(torch.reshape, (node.args[0], shape))
        node.replace_all_uses_with(fixed)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    network.recompile()
    return network


def _sizes(graph: fx.Graph, modules: dict[str, nn.Module], value: Any) -> list[int | fx.Node] | None:
    """The sizes that a tensor holds: stored, cut from the shape of another tensor, or joined of such."""
    if value.op == "get_attr":
        return [int(size) for size in _stored(modules, value) or []]
    if value.target is operator.getitem:
        shape, cuts = value.args
        while _kind(modules, shape) == "OnnxCast":
            shape = shape.args[0]
        if _kind(modules, shape) != "OnnxShape":
            return None
        (cut,) = cuts
        if cut.start < 0 or cut.stop < cut.start:  # counted from an end that is not known here
            return None
        axes = range(cut.start, cut.stop, cut.step)
        return [graph.call_method("size", (shape.args[0], axis)) for axis in axes]
    if _kind(modules, value) == "OnnxCast":
        return _sizes(graph, modules, value.args[0])
    if _kind(modules, value) == "OnnxConcat":
        joined = [_sizes(graph, modules, part) for part in value.args]
        if any(sizes is None for sizes in joined):
            return None
        return [size for sizes in joined for size in sizes or []]
    return None


def _kind(modules: dict[str, nn.Module], node: fx.Node) -> str:
    return type(modules[str(node.target)]).__name__ if node.op == "call_module" else ""


def _with_fixed_scales(network: fx.GraphModule) -> fx.GraphModule:
    """Let resizes by stored scales or sizes take them as numbers, for the same reason."""
    graph, modules = network.graph, dict(network.named_modules())
    for node in [node for node in graph.nodes if node.op == "call_module" and type(modules[node.target]).__name__ == "OnnxResize"]:
        from onnx2torch.node_converters.resize import _onnx_mode_to_torch_mode

        # Behind an input that the file leaves out, onnx2torch passes the others by name.
        inputs = dict(zip(("roi", "scales", "sizes"), node.args[1:], strict=False)) | node.kwargs
        scales_and_sizes = [inputs.get("scales"), inputs.get("sizes")]
        if any(isinstance(argument, fx.Node) and argument.op != "get_attr" for argument in scales_and_sizes):
            continue
        scales, sizes = (_stored(modules, argument) for argument in scales_and_sizes)
        numbers = scales or sizes
        if numbers is None:
            continue
        settings = {
            "size": sizes and [int(size) for size in sizes[2:]],
            "scale_factor": scales and scales[2:],
            "mode": _onnx_mode_to_torch_mode(modules[node.target].onnx_mode, len(numbers) - 2),
            "align_corners": modules[node.target].align_corners,
        }
        with graph.inserting_before(node):
            fixed = graph.call_function(nn.functional.interpolate, (node.args[0],), settings)
        node.replace_all_uses_with(fixed)
        graph.erase_node(node)
    network.recompile()
    return network


def _with_fixed_slices(network: fx.GraphModule) -> fx.GraphModule:
    """Let slices by stored numbers take them as numbers, for the same reason."""
    graph, modules = network.graph, dict(network.named_modules())
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        if not type(modules[node.target]).__name__.startswith("OnnxSlice"):
            continue
        arguments = dict(zip(("starts", "ends", "axes", "steps"), node.args[1:], strict=False))
        arguments |= node.kwargs
        if any(isinstance(a, fx.Node) and a.op != "get_attr" for a in arguments.values()):
            continue
        starts, ends, axes, steps = (
            _stored(modules, arguments.get(name)) for name in ("starts", "ends", "axes", "steps")
        )
        if starts is None or ends is None or any(step < 0 for step in steps or ()):
            continue
        axes = axes or list(range(len(starts)))
        if any(axis < 0 for axis in axes):  # counted from a last axis that the file does not name
            continue
        cuts = [slice(None)] * (int(max(axes)) + 1)
        for at, axis in enumerate(axes):
            step = 1 if steps is None else int(steps[at])
            cuts[int(axis)] = slice(int(starts[at]), int(ends[at]), step)
        with graph.inserting_before(node):
            fixed = graph.call_function(operator.getitem, (node.args[0], tuple(cuts)))
        node.replace_all_uses_with(fixed)
        graph.erase_node(node)
    network.recompile()
    return network


def _stored(modules: dict[str, nn.Module], argument: object) -> list[float] | None:
    """The numbers that an argument reads; None for no argument, or an empty one."""
    tensor = _stored_tensor(modules, argument)
    return None if tensor is None else tensor.tolist() or None


def _stored_tensor(modules: dict[str, nn.Module], argument: object) -> torch.Tensor | None:
    """The tensor of the file that an argument reads, if it reads one."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    owner, _, name = str(argument.target).rpartition(".")
    tensor: torch.Tensor = getattr(modules[owner], name)
    return tensor.detach()
