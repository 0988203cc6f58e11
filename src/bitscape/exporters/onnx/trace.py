"""From a traced graph to an ONNX model, and from the model to a file's content: what the ONNX exporters share."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bitscape.calling import Inputs
from bitscape.errors import BitscapeError, first_line, needs_extra
from bitscape.exporters.integer.graph import quiet
from bitscape.exporters.integer.interface import Interface

LAST = 2**63 - 1
"""End of a slice that reaches to the last value."""

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def onnx_graph(
    module: fx.GraphModule,
    interface: Interface,
    example: Inputs,
    operators: Mapping[Any, Callable[..., Any]],
    *,
    opset: int,
    free_batch: bool,
) -> "ir.Model":
    """The ONNX model of a traced graph; its inputs and outputs are called as `interface` says.

    Args:
        module: the module of a `Traced`.
        interface: the network's.
        example: what the network is called with; only shapes count.
        operators: bitscape's own torch operators -> what each becomes; called by torch.onnx with onnxscript's values.
        opset: version of the ONNX operators, 18 at least.
        free_batch: leave the batch size open; otherwise it is that of `example`.

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
                tuple(interface.tensors(example)),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=interface.free_batch() if free_batch else None,
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
    _name_ends(model.graph, interface)
    return model


def _name_ends(graph: "ir.Graph", interface: Interface) -> None:
    """Name the inputs and the outputs; values within the graph make way."""
    import onnx_ir as ir

    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in graph.outputs[:index]:  # an input, a constant, or another output once more
            node = ir.node("Identity", [value])
            graph.append(node)
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.outputs[index] = node.outputs[0]
    ends = [*graph.inputs, *graph.outputs]
    taken = {*interface.names, *interface.outputs}
    for value in [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]:
        if value.name in taken or value in ends:
            value.name = f"{value.name}.value"
    for value, name in zip(ends, (*interface.names, *interface.outputs), strict=True):
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
