"""Marks on the weights and biases that a file holds as integers: torch.onnx takes marked ones for results of an unknown operator.

It would transpose constants, fold norms into them and drop zeros, and the integers would no longer be found.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx

from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.integer.graph import quiet
from bitscape.exporters.integer.weights import bias_name

DOMAIN, MARK = "bitscape", "Mark"
"""The operator in the ONNX graph; its attribute "name" is the weight's or bias's."""


@torch.library.custom_op("bitscape::mark", mutates_args=())
def _mark(constant: Tensor, name: str) -> Tensor:
    return constant.clone()


@_mark.register_fake
def _(constant: Tensor, name: str) -> Tensor:
    return torch.empty_like(constant)


MARKED = torch.ops.bitscape.mark.default


def with_marks(network: IntegerNetwork) -> fx.GraphModule:
    """A copy of the module with a mark behind every weight and bias of integers."""
    with quiet():  # torch's own, about the classes that describe inputs and outputs
        module = fx.GraphModule(network.module, copy.deepcopy(network.module.graph))
    names = {*network.weights, *map(bias_name, network.biases)}
    for node in [node for node in module.graph.nodes if node.op == "get_attr" and node.target in names]:
        with module.graph.inserting_after(node):
            mark = module.graph.call_function(MARKED, (node, node.target))
        node.replace_all_uses_with(mark, delete_user_cb=lambda user, mark=mark: user is not mark)
    module.recompile()
    return module


def mark_node(constant: Any, name: str) -> Any:
    """What a mark becomes in ONNX. Called by torch.onnx with onnxscript's values."""
    import onnxscript
    from onnx.defs import OpSchema

    x, y = (OpSchema.FormalParameter(name, "tensor(float)") for name in "xy")
    attribute = OpSchema.Attribute("name", OpSchema.AttrType.STRING)
    schema = OpSchema(MARK, DOMAIN, 1, inputs=[x], outputs=[y], attributes=[attribute])
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), MARK, schema)(constant, name=name)
