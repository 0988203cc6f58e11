"""From a traced graph to an ONNX model, and from the model to a file's content: what the ONNX exporters share."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from bitscape.errors import BitscapeError, first_line, needs_extra
from bitscape.exporters.integer.graph import quiet
from bitscape.models.named_outputs import named_outputs

LAST = 2**63 - 1
"""End of a slice that reaches to the last value."""

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def onnx_graph(
    module: fx.GraphModule, images: Tensor, operators: Mapping[Any, Callable[..., Any]], *, opset: int, free_batch: bool
) -> "ir.Model":
    """The ONNX model of a traced graph; its input is called as the network's forward calls it, its outputs as `named_outputs` does.

    Args:
        module: the module of a `Traced`.
        images: (n, c, h, w) as the network takes them; only their shape counts.
        operators: bitscape's own torch operators -> what each becomes; called by torch.onnx with onnxscript's values.
        opset: version of the ONNX operators, 18 at least.
        free_batch: leave the batch size open; otherwise it is that of `images`.

    Raises:
        BitscapeError: the packages of the extra "onnx" are missing, or torch.onnx does not know an operator of the graph.
    """
    with needs_extra("onnx"):
        import onnxscript  # noqa: F401 # torch.onnx needs it
    try:
        # The oldest onnxscript allowed prints how many rules it applied.
        with quiet(), redirect_stdout(io.StringIO()):
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},) if free_batch else None,
                custom_translation_table=dict(operators),
                verbose=False,
                optimize=True,
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise BitscapeError(
            f"network: torch.onnx cannot write it ({type(cause).__name__}: {first_line(cause)}); use `bitscape export packed`, which "
            "needs no graph"
        ) from error
    assert program is not None
    model: ir.Model = program.model
    with torch.no_grad():
        names = list(named_outputs(module(images)))
    (placeholder,) = module.graph.find_nodes(op="placeholder")
    _name_ends(model.graph, str(placeholder.target), names)
    return model


def _name_ends(graph: "ir.Graph", images: str, outputs: Sequence[str]) -> None:
    """Name the input and the outputs; values within the graph make way, and so does an input of an output's name."""
    import onnx_ir as ir

    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in graph.outputs[:index]:  # the images, a constant, or another output once more
            node = ir.node("Identity", [value])
            graph.append(node)
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.outputs[index] = node.outputs[0]
    ends = [*graph.inputs, *graph.outputs]
    taken = {images, *outputs}
    for value in [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]:
        if value.name in taken or value in ends:
            value.name = f"{value.name}.value"
    graph.inputs[0].name = f"{images}.input" if images in outputs else images
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name


def pool_globally(node: "ir.Node") -> None:
    """Write a mean over all pixels as the pooling that runtimes have an integer kernel for; leave other nodes as they are."""
    import onnx_ir as ir

    if node.op_type != "ReduceMean" or node.graph is None:
        return
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if axes is None or shape is None or shape.rank() != 4 or not node.attributes.get_int("keepdims", 1):
        return
    if sorted(axis % 4 for axis in axes.numpy().tolist()) == [2, 3]:
        pooled = ir.node("GlobalAveragePool", [node.inputs[0]])
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [pooled], node.outputs, pooled.outputs)


def pad_circularly(node: "ir.Node") -> None:
    """Write circular padding as slices of a tensor joined to it, which every runtime reads; leave other nodes as they are."""
    import onnx_ir as ir

    if node.op_type != "Pad" or node.attributes.get_string("mode", "constant") != "wrap" or node.graph is None:
        return
    widths = ir.convenience.get_const_tensor(node.inputs[1])  # type: ignore[arg-type]  # it has widths
    assert widths is not None, "the widths of padding are numbers"
    amounts: list[int] = widths.numpy().tolist()  # in front of every axis, then behind
    if min(amounts) < 0 or not any(amounts):
        return
    padded, nodes = node.inputs[0], list[ir.Node]()
    for axis, (before, behind) in enumerate(zip(amounts[: len(amounts) // 2], amounts[len(amounts) // 2 :], strict=True)):
        last = [_slice(padded, axis, -before, LAST)] if before else []
        first = [_slice(padded, axis, 0, behind)] if behind else []
        if before or behind:
            parts = [*(part[-1].outputs[0] for part in last), padded, *(part[-1].outputs[0] for part in first)]
            nodes += [node for part in (*last, *first) for node in part] + [ir.node("Concat", parts, {"axis": axis})]
            padded = nodes[-1].outputs[0]
    nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


def _slice(value: "ir.Value | None", axis: int, start: int, end: int) -> "list[ir.Node]":
    """A Slice along one axis, behind the constants that it takes."""
    import onnx_ir as ir

    limits = [ir.node("Constant", [], {"value_ints": [number]}) for number in (start, end, axis)]
    return [*limits, ir.node("Slice", [value, *(limit.outputs[0] for limit in limits)])]


def checked_bytes(proto: "onnx.ModelProto") -> bytes:
    """The model as a file's content, valid by the ONNX checker. Raises BitscapeError if it is not."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise BitscapeError(f"the ONNX graph is not valid ({first_line(error)}); this network cannot be exported to ONNX") from error
    return bytes(proto.SerializeToString())
