"""The integer form of a traced network: integer weights and biases, uint8 activations, norms and rectifiers gone.

It still runs in torch, in float, and is then the simulation of what a runtime computes from it: the same quantizers at the same places.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from bitscape.errors import BitscapeError
from bitscape.export.graph import LINEAR, ActivationGrid, Traced, grid_of, is_quantizer, set_grid, trace
from bitscape.export.placement import (
    CONCATENATION,
    PLACEHOLDER,
    RECTIFIERS,
    is_move,
    place_quantizers,
    quantized_source,
    repeat_quantizers,
)
from bitscape.quant.convert import batches_of, sample_values
from bitscape.quant.grid import Grid
from bitscape.quant.observers import Mse, Observer
from bitscape.quant.quantizers.base import Codes

_log = logging.getLogger("bitscape.export")
aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default
SIGNED_ZERO = 128
"""Signed activations are uint8 with this zero point: runtimes want one type for what goes in and comes out of a kernel."""
DEAD = 1e-30
"""Channels of smaller weight scales are nothing but their bias; products of such scales leave the range of float32."""
LARGEST_BIAS = 2**30
"""Biases are int32, and sums of products are added to them."""


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as integers: real = scale * q, one scale for each output channel."""

    q: Tensor
    """int16 in the weight's shape; within -128..127."""
    scale: Tensor
    """float32 (output channels,), not zero; negative where a norm with a negative gamma was folded."""

    @property
    def bits(self) -> int:
        """Smallest two's complement width that holds every code."""
        low, high = int(self.q.min()), int(self.q.max())
        return max((-low - 1 if low < 0 else 0).bit_length(), high.bit_length()) + 1

    def dequantize(self) -> Tensor:
        """Real values, float32."""
        return self.q.float() * self.scale.reshape(-1, *[1] * (self.q.ndim - 1))


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A network whose layers compute with integers."""

    module: fx.GraphModule
    """The simulation: float32 images (n, c, h, w) in, the network's outputs out."""
    weights: Mapping[str, IntegerWeight]
    """Name of the weight -> its integers."""
    biases: Mapping[str, Tensor]
    """Name of the same weight -> bias in units of input scale times weight scale, int64 (output channels,); absent without a bias."""
    added: Mapping[str, ActivationGrid]
    """Name of a tensor in the graph -> the 8-bit grid that it got in addition to the layers' own."""


def integer_network(network: nn.Module, images: Tensor, observer: Observer | None = None) -> IntegerNetwork:
    """Trace a quantized network and bring it into integer form.

    Args:
        network: calibrated or trained, of static bits; it stays as it is.
        images: normalized float32 (n, c, h, w), two at least, better a few hundred; they calibrate the added quantizers.
        observer: how these ranges are chosen; mean squared error by default.

    Raises:
        BitscapeError: as `trace`; or weights and activations that no 8-bit integer can hold.
    """
    traced = _of_integers(trace(network, images))
    module, graph = traced.module, traced.module.graph
    weights = {key: _integer_weight(key, codes) for key, codes in traced.codes.items()}
    biases = _fold_norms(traced, weights)
    for node in graph.nodes:
        if is_quantizer(node):
            set_grid(node, uint8_grid(grid_of(node)))
    added = place_quantizers(graph, traced.is_layer)
    integer_biases = {key: _integer_bias(traced, weights, key, bias) for key, bias in biases.items()}
    _write_back(traced, weights, integer_biases)
    _calibrate(module, added, images, observer or Mse())  # with the folded norms' scales and biases in the module
    repeat_quantizers(graph, traced.is_layer)
    _absorb_rectifiers(graph)
    _loosen(graph)
    graph.eliminate_dead_code()
    module.recompile()
    found = {str(node.args[0]): grid_of(node) for node in added}
    _log.info("integer graph: %d layers, %d quantizers of 8 bits added", len(weights), len(found))
    return IntegerNetwork(module, weights, {key: integers for key, (integers, _) in integer_biases.items()}, found)


def _of_integers(traced: Traced) -> Traced:
    """Without the codes of layers that are to stay float, for their own forward changes the weight or the quantized input."""
    floats = set()
    for node in traced.module.graph.nodes:
        if node.op == "get_attr" and node.target in traced.codes:
            layers = [user for user in node.users if traced.weight_name(user) and quantized_source(_node(user.args[0])) is not None]
            if len(layers) < len(node.users):
                floats.add(node.target)
                _log.warning("layer %s: its forward changes the quantized weight or input; it stays float", node.target)
    return replace(traced, codes={key: codes for key, codes in traced.codes.items() if key not in floats})


def _integer_weight(name: str, codes: Codes) -> IntegerWeight:
    q, scale = codes.q.short(), codes.scale.reshape(-1).expand(len(codes.q)).float()
    if codes.zero_point:  # mid-rise: scale * (q + 1/2) is half the scale times an odd number
        q, scale = 2 * q + 1, scale / 2
    if q.abs().max() > 128:
        raise BitscapeError(f"{name}: levels without a zero at 8 bits need 9-bit integers; give the layer 7 bits, or quantize with Lsq")
    return IntegerWeight(q, scale.clone())


def _fold_norms(traced: Traced, weights: dict[str, IntegerWeight]) -> dict[str, Tensor]:
    """Fold the norms behind layers into their scales and biases; return the biases, float64, of all layers that have one.

    A norm multiplies a channel by gamma / sigma, which goes into its scale: exact, whatever the quantizer was.
    """
    biases = {}
    for node in list(traced.module.graph.nodes):
        key = traced.weight_name(node)
        if key is None:
            continue
        bias, norm = _bias_of(traced.module, node), next(iter(node.users))
        used_once = len(node.users) == len(_node(node.args[1]).users) == 1
        # Behind a linear layer of tokens, a norm's channels are the tokens.
        if used_once and norm.target is NORM and (node.target is not LINEAR or node.meta["val"].ndim == 2):
            weights[key], bias = _folded(traced.module, norm, weights[key], bias)
            for first in list(norm.users):  # it returns a tuple
                first.replace_all_uses_with(node)
                traced.module.graph.erase_node(first)
            traced.module.graph.erase_node(norm)
        if bias is not None:
            biases[key] = bias
    return biases


def _folded(module: fx.GraphModule, norm: fx.Node, weight: IntegerWeight, bias: Tensor | None) -> tuple[IntegerWeight, Tensor]:
    gamma, beta, mean, variance = (None if arg is None else _value(module, arg).double() for arg in norm.args[1:5])
    assert mean is not None and variance is not None and isinstance(norm.args[6], float)
    factor = (variance + norm.args[6]).rsqrt() * (1.0 if gamma is None else gamma)
    # A negative gamma makes negative scales: turned codes would need one more bit, for -2^(b-1) has no opposite.
    scale = (weight.scale * factor).float()
    dead = scale.abs() < DEAD
    codes = weight.q.masked_fill(dead.reshape(-1, *[1] * (weight.q.ndim - 1)), 0)
    shifted = ((0.0 if bias is None else bias) - mean) * factor + (0.0 if beta is None else beta)
    return IntegerWeight(codes, torch.where(dead, weight.scale, scale)), shifted


def uint8_grid(grid: ActivationGrid) -> ActivationGrid:
    """The same grid in codes from 0 to 255.

    A zero point between two codes (LSQ+) moves to the nearer one.

    Raises:
        BitscapeError: the signs of one bit, between which no code stands for zero.
    """
    if grid.zero_point == -0.5:
        raise BitscapeError("activations of one signed bit have no zero, and no integer runtime computes with them; give the layer 2 bits")
    zero_point = round(grid.zero_point)
    shift = SIGNED_ZERO if grid.qmin < 0 else max(0, -zero_point)
    low, high = grid.qmin + shift, min(255, grid.qmax + shift)
    if not (0 <= low < high and 0 <= zero_point + shift <= 255):
        raise BitscapeError(f"an activation's grid {grid} lies too far from zero for 8-bit codes; calibrate the network anew")
    return ActivationGrid(scale=grid.scale, zero_point=float(zero_point + shift), qmin=low, qmax=high)


def _calibrate(module: fx.GraphModule, added: list[fx.Node], images: Tensor, observer: Observer) -> None:
    recorder = _Recorder(module, added)
    with torch.no_grad():
        for batch in batches_of(images, module):
            recorder.run(batch)
    for node, samples in recorder.samples.items():
        values = torch.cat(samples)
        signed = bool(values.min() < 0)
        scale = float(observer.scale(values[None], Grid(-128, 127) if signed else Grid(0, 255))[0])
        set_grid(node, replace(PLACEHOLDER, scale=scale, zero_point=float(SIGNED_ZERO if signed else 0)))


class _Recorder(fx.Interpreter):
    """Runs a graph in which some quantizers pass values on and keep a sample of them."""

    def __init__(self, module: fx.GraphModule, added: list[fx.Node]) -> None:
        super().__init__(module)
        self.samples: dict[fx.Node, list[Tensor]] = {node: [] for node in added}
        self._generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> object:
        if n not in self.samples:
            return super().run_node(n)
        value: Tensor = self.fetch_args_kwargs_from_env(n)[0][0]
        self.samples[n].append(sample_values(value, self._generator))
        return value


def _absorb_rectifiers(graph: fx.Graph) -> None:
    """Let quantizers cut off what rectifiers in front of them would; exact, for rounding is monotone."""
    for node in list(graph.nodes):
        if node.target in RECTIFIERS and (source := quantized_source(node.args[0])) is not None and not _cuts(node, grid_of(source)):
            node.replace_all_uses_with(node.args[0])
        elif is_quantizer(node):
            while (rectifier := _node(node.args[0])).target in RECTIFIERS:
                low, high = grid_of(node).quantize(torch.tensor(_limits(rectifier))).int().tolist()
                set_grid(node, replace(grid_of(node), qmin=low, qmax=high))
                node.replace_input_with(rectifier, _node(rectifier.args[0]))


def _limits(rectifier: fx.Node) -> tuple[float, float]:
    """Smallest and largest value that a rectifier lets through."""
    if rectifier.target in (aten.relu.default, aten.relu6.default):
        return 0.0, math.inf if rectifier.target is aten.relu.default else 6.0
    default = (-1.0, 1.0) if rectifier.target is aten.hardtanh.default else (None, None)
    low, high = (*rectifier.args[1:], *default[len(rectifier.args) - 1 :])[:2]
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _cuts(rectifier: fx.Node, grid: ActivationGrid) -> bool:
    """Whether a rectifier changes values of the grid; zero is one, for padding may stand between the two."""
    (low, high), reach = _limits(rectifier), (grid.qmin - grid.zero_point, 0.0, grid.qmax - grid.zero_point)
    return grid.scale * min(reach) < low or grid.scale * max(reach) > high


def _loosen(graph: fx.Graph) -> None:
    """Take the limits from quantizers whose inputs lie on their grid already: they cut off nothing."""
    tight = {node: grid_of(node) for node in graph.nodes if is_quantizer(node)}
    for node, grid in tight.items():
        sources = _grids_of(_node(node.args[0]), tight)
        if sources and all(_within(source, grid) for source in sources):
            set_grid(node, replace(grid, qmin=0, qmax=255))


def _grids_of(node: fx.Node, grids: Mapping[fx.Node, ActivationGrid]) -> list[ActivationGrid | None]:
    if node.target is CONCATENATION:
        return [grid for part in node.all_input_nodes for grid in _grids_of(part, grids)]
    source = quantized_source(node)
    if source is None and is_move(node):
        return _grids_of(node.all_input_nodes[0], grids)
    return [None if source is None else grids[source]]


def _within(source: ActivationGrid | None, grid: ActivationGrid) -> bool:
    if source is None or (source.scale, source.zero_point) != (grid.scale, grid.zero_point):
        return False
    return grid.qmin <= source.qmin and source.qmax <= grid.qmax and grid.qmin <= grid.zero_point <= grid.qmax


def _integer_bias(traced: Traced, weights: dict[str, IntegerWeight], key: str, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (int64) and the spacing (float32) of a bias: input scale times weight scale.

    Where a channel's spacing is so small that its bias needs more than 30 bits, its weights count for nothing beside the bias: they get the
    spacing that the bias needs.
    """
    scale, weight = input_scale(traced.module.graph, key), weights[key]
    smallest = (bias.abs() / (scale * LARGEST_BIAS)).float()
    narrow = weight.scale.abs() < smallest
    if bool(narrow.any()):
        wider = torch.where(narrow, smallest.copysign(weight.scale), weight.scale)
        ratio = (weight.scale / wider).reshape(-1, *[1] * (weight.q.ndim - 1))
        weights[key] = IntegerWeight((weight.q * ratio).round().short(), wider)
    spacing = weights[key].scale * torch.tensor(scale, dtype=torch.float32, device=bias.device)
    return (bias / spacing).round().long(), spacing


def input_scale(graph: fx.Graph, weight: str) -> float:
    """Scale of the activations that meet the weight of this name."""
    for node in graph.nodes:
        if len(node.args) > 1 and isinstance(node.args[1], fx.Node) and node.args[1].target == weight:
            source = quantized_source(node.args[0])
            assert source is not None, f"the input of {weight} is not quantized"
            return grid_of(source).scale
    raise AssertionError(f"nothing takes {weight}")


def _write_back(traced: Traced, weights: Mapping[str, IntegerWeight], biases: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put the values that the integers stand for into the module."""
    for key, weight in weights.items():
        _set(traced.module, key, weight.dequantize())
    for key, (integers, spacing) in biases.items():
        _set(traced.module, bias_name(key), integers.float() * spacing)
    for node in list(traced.module.graph.nodes):
        name = traced.weight_name(node)
        if name in biases:  # in the place of none, or of one that several layers share
            with traced.module.graph.inserting_before(node):
                node.args = (*node.args[:2], traced.module.graph.get_attr(bias_name(str(name))), *node.args[3:])


def bias_name(weight: str) -> str:
    """Name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def _bias_of(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return None if bias is None else _value(module, bias).double()


def _value(module: fx.GraphModule, node: object) -> Tensor:
    found = attrgetter(str(_node(node).target))(module)
    assert isinstance(found, Tensor)
    return found.detach()


def _set(module: fx.GraphModule, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
