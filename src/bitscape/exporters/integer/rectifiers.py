"""What quantizers cut off: rectifiers in front of them are absorbed, and limits that cut off nothing are taken away."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from bitscape.exporters.integer.graph import ActivationGrid, grid_of, is_quantizer, set_grid
from bitscape.exporters.integer.placement import CONCATENATION, RECTIFIERS, is_move, quantized_source

aten = torch.ops.aten


def absorb_rectifiers(graph: fx.Graph) -> None:
    """Let quantizers cut off what rectifiers in front of them would; exact, for rounding is monotone."""
    for node in list(graph.nodes):
        if (
            node.target in RECTIFIERS
            and (source := quantized_source(node.all_input_nodes[0])) is not None
            and not _cuts(node, grid_of(source))
        ):
            node.replace_all_uses_with(node.all_input_nodes[0])
        elif is_quantizer(node):
            while (rectifier := node.all_input_nodes[0]).target in RECTIFIERS:
                low, high = grid_of(node).quantize(torch.tensor(_limits(rectifier))).int().tolist()
                set_grid(node, replace(grid_of(node), qmin=low, qmax=high))
                node.replace_input_with(rectifier, rectifier.all_input_nodes[0])


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


def loosen_limits(graph: fx.Graph) -> None:
    """Take the limits from quantizers whose inputs lie on their grid already: they cut off nothing."""
    tight = {node: grid_of(node) for node in graph.nodes if is_quantizer(node)}
    for node, grid in tight.items():
        sources = _grids_of(node.all_input_nodes[0], tight)
        if sources and all(_within(source, grid) for source in sources):
            set_grid(node, replace(grid, qmin=0, qmax=grid.top))


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
