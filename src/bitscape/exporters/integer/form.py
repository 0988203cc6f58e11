"""The integer form of a traced network: integer weights and biases, uint8 or uint16 activations, norms and rectifiers gone.

It still runs in torch, in float, and is then the simulation of what a runtime computes from it: the same quantizers at the same places.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, prefixed
from bitscape.exporters.integer.calls import separate_calls
from bitscape.exporters.integer.graph import BYTE, WORD, ActivationGrid, Traced, grid_of, is_quantizer, layer_of, set_grid, trace
from bitscape.exporters.integer.interface import Interface, as_samples
from bitscape.exporters.integer.norms import fold_into_integers, spell_out_norms
from bitscape.exporters.integer.placement import place_quantizers, quantized_source, repeat_quantizers
from bitscape.exporters.integer.rectifiers import absorb_rectifiers, loosen_limits
from bitscape.exporters.integer.weights import IntegerWeight, integer_bias, integer_weight, with_positive_scales, write_back
from bitscape.quant.convert import batches_of
from bitscape.quant.functional import require_finite
from bitscape.quant.observers import Mse, Observer, activation_range
from bitscape.quant.reference import HALF
from bitscape.quant.samples import ValueSample

_log = logging.getLogger("bitscape.exporters")
@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A network whose layers compute with integers."""

    module: fx.GraphModule
    """The simulation: the tensors of `interface` in, one argument each; out a tensor where the network returns one, else a dict by name."""
    weights: Mapping[str, IntegerWeight]
    """Name of the weight -> its integers; further calls of a layer have weights of their own (`separate_calls`)."""
    biases: Mapping[str, Tensor]
    """Name of the same weight -> bias in units of input scale times weight scale, int64 (output channels,); absent without a bias."""
    layers: Mapping[str, str]
    """Name of the same weight -> its layer in the network."""
    added: Mapping[str, ActivationGrid]
    """Name of a tensor in the graph -> the 8-bit grid that it got in addition to the layers' own."""
    interface: Interface
    """What the network takes and returns."""


def integer_network(
    network: nn.Module, data: Samples | Inputs, observer: Observer | None = None, *, integers_only: bool = False
) -> IntegerNetwork:
    """Trace a quantized network and bring it into integer form.

    Args:
        network: calibrated or trained, of static bits; it stays as it is.
        data: samples, or what the network is called with, normalized; two at least, better a few hundred, of one
            shape. They calibrate the added quantizers.
        observer: how these ranges are chosen; mean squared error by default.
        integers_only: for runtimes that have integer operators alone: no tensor stays float, scales of weights are
            positive, and the zero of 16-bit activations stands in the middle of the codes.

    Raises:
        BitscapeError: as `trace`; no layer that can be computed in integers; or weights and activations that no 8-bit integer can hold.
    """
    traced, layers = separate_calls(_of_integers(trace(network, data)))
    if integers_only:
        _fold_constants(traced.module)
    module, graph = traced.module, traced.module.graph
    weights = {key: integer_weight(key, codes) for key, codes in traced.codes.items()}
    biases = fold_into_integers(traced, weights)
    if integers_only:
        spell_out_norms(traced)
        weights = {key: with_positive_scales(weight) for key, weight in weights.items()}
    for node in graph.nodes:
        if is_quantizer(node):
            with prefixed(_place(node)):
                grid = unsigned_grid(grid_of(node))
                set_grid(node, centered(grid) if integers_only else grid)
    added = place_quantizers(graph, traced.is_layer, everywhere=integers_only)
    integer_biases = {key: integer_bias(graph, weights, key, bias) for key, bias in biases.items()}
    write_back(traced, weights, integer_biases)
    _calibrate(traced, added, as_samples(data), observer or Mse())  # with the folded norms' scales and biases in the module
    repeat_quantizers(graph, traced.is_layer)
    absorb_rectifiers(graph)
    loosen_limits(graph)
    graph.eliminate_dead_code()
    module.recompile()
    found = {str(node.args[0]): grid_of(node) for node in added}
    _log.info("integer graph: %d layers, %d quantizers of 8 bits added", len(weights), len(found))
    biases_only = {key: integers for key, (integers, _) in integer_biases.items()}
    return IntegerNetwork(module, weights, biases_only, layers, found, traced.interface)


def _of_integers(traced: Traced) -> Traced:
    """Without the codes of layers that compute no integers for an image.

    Those whose own forward changes the weight, the bias or the quantized input stay float. Those to which nothing of the image comes
    (tables of positions) give way to what they compute.

    Raises:
        BitscapeError: none is left.
    """
    graph = traced.module.graph
    _replace_what_sees_no_image(traced)
    floats = set()
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in traced.codes and not all(_is_plain(traced, user) for user in node.users):
            floats.add(node.target)
            _log.warning("layer %s: its forward changes the quantized weight, bias or input; it stays float", layer_of(node.target))
    used = {key for node in graph.nodes if (key := traced.weight_name(node)) is not None}
    kept = {key: codes for key, codes in traced.codes.items() if key in used - floats}
    if not kept:
        autocasts = any(node.kwargs.get("dtype") in HALF for node in graph.nodes)
        reason = ", because it autocasts within its forward: export it without autocast" if autocasts else ""
        raise BitscapeError(f"network: none of its layers can be computed in integers{reason}; `bitscape export packed` needs none")
    return replace(traced, codes=kept)


def _is_plain(traced: Traced, node: fx.Node) -> bool:
    """Whether a node that takes a quantized weight is a layer of quantized input and stored bias."""
    if not traced.is_layer(node) or quantized_source(node.all_input_nodes[0]) is None:
        return False
    bias = node.args[2] if len(node.args) > 2 else None
    return not isinstance(bias, fx.Node) or bias.op == "get_attr"


def _replace_what_sees_no_image(traced: Traced) -> None:
    """Put what layers compute from nothing of the images in their place."""
    graph = traced.module.graph
    of_images = set(graph.find_nodes(op="placeholder"))
    for node in list(graph.nodes):
        key = traced.weight_name(node)
        if of_images.intersection(node.all_input_nodes):
            of_images.add(node)
        elif key is not None:
            _replace_by_value(traced.module, node)
            _log.warning("layer %s: its input is the same for every image; what it computes is stored in its place", layer_of(key))
    graph.eliminate_dead_code()


def _fold_constants(module: fx.GraphModule) -> None:
    """Put what is computed from nothing of the images in its place: it is a constant that an operator takes."""
    of_images = set(module.graph.find_nodes(op="placeholder"))
    for node in list(module.graph.nodes):
        if of_images.intersection(node.all_input_nodes):
            of_images.add(node)
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            _replace_by_value(module, node)
    module.graph.eliminate_dead_code()


def _replace_by_value(module: fx.GraphModule, node: fx.Node) -> None:
    """Put what a node computes, from nothing of the images, into the module, and the node's users read that."""
    interpreter = fx.Interpreter(module)

    def value_of(given: fx.Node) -> Any:
        arguments, keywords = fx.map_arg(given.args, value_of), fx.map_arg(given.kwargs, value_of)
        return getattr(interpreter, given.op)(given.target, arguments, keywords)

    with torch.no_grad():
        module.register_buffer(f"{node.name}_value", value_of(node))
    with module.graph.inserting_before(node):
        stored = module.graph.get_attr(f"{node.name}_value")
    stored.meta = dict(node.meta)
    node.replace_all_uses_with(stored)
    module.graph.erase_node(node)


def _place(quantizer: fx.Node) -> str:
    """Where an input quantizer of the network stands, for messages."""
    *_, (module, _) = quantizer.meta["nn_module_stack"].values()
    return f"layer {module.removesuffix('input_quantizer').removesuffix('.')}"


def unsigned_grid(grid: ActivationGrid) -> ActivationGrid:
    """The same grid in codes from 0 to 255, or to 65,535 for activations of 16 bits: runtimes want one type for all of them.

    Zero is the middle code of grids that reach below it and fit around that. A zero point between two codes (LSQ+) moves to
    the nearer one.

    Raises:
        BitscapeError: the signs of one bit, between which no code stands for zero; or levels that lie so far from zero that the type
            does not hold both.
    """
    if grid.zero_point == -0.5:
        raise BitscapeError("activations of one signed bit have no zero, and no integer runtime computes with them; give the layer 2 bits")
    zero_point = round(grid.zero_point)
    needed = max(grid.qmax, zero_point) - min(grid.qmin, zero_point) + 1
    top = WORD if grid.qmax - grid.qmin > BYTE else BYTE
    if needed > top + 1:
        raise BitscapeError(
            f"its {grid.qmax - grid.qmin + 1} activation levels lie so far from zero (zero point {grid.zero_point:.6g}) that both take "
            f"{needed} codes, and integer runtimes have {top + 1}; give its input fewer bits, or quantize with Lsq, "
            "whose levels begin at zero"
        )
    half = (top + 1) // 2
    fits_around = grid.qmin < 0 and -half <= grid.qmin and grid.qmax < half
    shift = half if fits_around else max(0, -zero_point, -grid.qmin)
    return ActivationGrid(scale=grid.scale, zero_point=float(zero_point + shift), qmin=grid.qmin + shift, qmax=grid.qmax + shift)


def centered(grid: ActivationGrid) -> ActivationGrid:
    """A grid of `unsigned_grid` whose zero stands in the middle of the 16-bit codes: unsigned activations lose a bit."""
    middle = (WORD + 1) // 2
    if not grid.is_wide or grid.zero_point == middle:
        return grid
    coarser = 2  # the smallest factor by which the codes on either side of zero fit into half of the type
    low, high = (round((code - grid.zero_point) / coarser) for code in (grid.qmin, grid.qmax))
    limits = {"qmin": middle + max(low, -middle), "qmax": middle + min(high, middle - 1)}
    return ActivationGrid(scale=coarser * grid.scale, zero_point=float(middle), **limits)


def _calibrate(traced: Traced, added: list[fx.Node], samples: Samples, observer: Observer) -> None:
    recorder = _Recorder(traced.module, added)
    with torch.no_grad():
        for inputs in batches_of(samples, traced.module):
            recorder.run(*traced.interface.tensors(inputs))
    for node, sample in recorder.samples.items():
        values = sample.values()
        with prefixed("images, behind the network's operators"):
            require_finite(values)
        scale, levels = activation_range(values, 8, observer)
        limits = {"qmin": int(levels.qmin), "qmax": int(levels.qmax)}
        set_grid(node, unsigned_grid(ActivationGrid(scale=float(scale), zero_point=0.0, **limits)))


class _Recorder(fx.Interpreter):
    """Runs a graph in which some quantizers pass values on and keep a sample of them."""

    def __init__(self, module: fx.GraphModule, added: list[fx.Node]) -> None:
        super().__init__(module)
        self.samples = {node: ValueSample() for node in added}

    def run_node(self, n: fx.Node) -> object:
        if n not in self.samples:
            return super().run_node(n)
        value: Tensor = self.fetch_args_kwargs_from_env(n)[0][0]
        self.samples[n].add(value)
        return value
