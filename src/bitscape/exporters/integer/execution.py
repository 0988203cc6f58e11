"""An integer network run with the very arithmetic of integer kernels, instead of with floats that simulate it.

Where a value lies within a float's rounding of the edge between two codes, the simulation in float32 takes the other code now and then
(two in a million), and the layers behind multiply such differences. Here sums of products are exact whole numbers, and one float32
multiplication brings them to the next tensor's codes, as in ONNX Runtime's kernels.
"""

import torch
from torch import Tensor, fx

from bitscape.calling import Inputs
from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.integer.graph import LINEAR, ActivationGrid, grid_of, is_quantizer
from bitscape.exporters.integer.weights import IntegerWeight, input_grid
from bitscape.models.named_outputs import named_outputs
from bitscape.quant.convert import batches_of


@torch.no_grad()
def run_integers(network: IntegerNetwork, inputs: Inputs) -> dict[str, Tensor]:
    """The network's outputs by name for one batch of what it is called with, its layers computed in integers."""
    (batch,) = batches_of([inputs], network.module)
    return named_outputs(_Executor(network).run(*network.interface.tensors(batch)))


class _Executor(fx.Interpreter):
    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__(network.module)
        graph = network.module.graph
        self._network = network
        self._scales = {key: input_grid(graph, key).scale for key in network.weights}
        self._exact = {key: _exact_type(weight, input_grid(graph, key)) for key, weight in network.weights.items()}
        self._sums: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        """Layer -> its exact sums, float64, and their spacing; until its last user has run."""

    def run_node(self, n: fx.Node) -> object:
        value = self._run_node(n)
        for used in self.user_to_last_uses.get(n, []):  # as the interpreter does with the values themselves
            self._sums.pop(used, None)
        return value

    def _run_node(self, n: fx.Node) -> object:
        key = str(n.args[1].target) if len(n.args) > 1 and isinstance(n.args[1], fx.Node) else ""
        if key in self._network.weights:
            return self._run_layer(n, key)
        if is_quantizer(n) and isinstance(n.args[0], fx.Node) and n.args[0] in self._sums:
            return self._requantize(n, *self._sums[n.args[0]])
        return super().run_node(n)

    def _run_layer(self, node: fx.Node, key: str) -> Tensor:
        (x, _, *rest), _ = self.fetch_args_kwargs_from_env(node)
        weight, scale = self._network.weights[key], torch.tensor(self._scales[key], dtype=torch.float32)
        exact = self._exact[key]
        assert callable(node.target)
        sums: Tensor = node.target((x / scale).round().to(exact), weight.q.to(exact), None, *rest[1:]).double()
        spacing = _by_channel(weight.output_scale * scale, sums, node)
        if key in self._network.biases:
            bias = _by_channel(self._network.biases[key].double(), sums, node)
            if node.target is LINEAR and sums.ndim > 2:  # MatMul and Add in ONNX: the one operator whose kernel adds the bias in float
                return sums.float() * spacing + bias.float() * spacing
            sums += bias
        self._sums[node] = sums, spacing
        return sums.float() * spacing

    def _requantize(self, node: fx.Node, sums: Tensor, spacing: Tensor) -> Tensor:
        grid = grid_of(node)
        codes = (sums.float() * (spacing / spacing.new_tensor(grid.scale))).round_().add_(grid.zero_point)
        return grid.dequantize(codes.clamp_(grid.qmin, grid.qmax))


def _exact_type(weight: IntegerWeight, grid: ActivationGrid) -> torch.dtype:
    """The faster float type in which no sum of products of this weight with codes of its input's type, of either sign, is rounded.

    On a GPU never float32: its convolutions may go through transforms that round.
    """
    largest = grid.top * int(weight.rows.abs().flatten(1).sum(1).max())
    return torch.float32 if largest < 2**24 and weight.q.device.type == "cpu" else torch.float64


def _by_channel(values: Tensor, like: Tensor, node: fx.Node) -> Tensor:
    """`values` (channels,) to broadcast against a layer's output: channels stand last behind a linear layer, second behind the others."""
    return values if node.target is LINEAR else values.reshape(-1, *[1] * (like.ndim - 2))
