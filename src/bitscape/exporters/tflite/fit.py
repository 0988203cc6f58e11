"""An integer network with the grids that LiteRT's operators ask for.

    sigmoid, softmax                 results in steps of 1/256 from zero on; of 16 bits 1/32,768
    average pooling, bilinear resize results on the grid of their input
    concatenation                    operands on the grid of the result, to which they are rounded in any case
    every operator                   8 bits, or 16, for all that it takes and makes

Where a tensor's grid is another, a quantizer stands between: the file requantizes there, and so does the simulation.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.integer.graph import (
    BYTE,
    LINEAR,
    WORD,
    ActivationGrid,
    aten,
    grid_of,
    insert_quantizer,
    is_quantizer,
    set_grid,
)
from bitscape.exporters.integer.placement import CONCATENATION, is_move, quantized_source

SAME_GRID = {
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_bilinear2d.vec,
}
"""Operators whose result lies on the grid of what they take; a mean of the whole image does not."""
UNIT = {aten.sigmoid.default, aten._softmax.default, aten.softmax.int}
"""Operators whose results lie between 0 and 1, in steps that LiteRT gives."""
MIDDLE = (WORD + 1) // 2


def fit(network: IntegerNetwork) -> IntegerNetwork:
    """Change the graph of `network`, one of `integers_only`, to what LiteRT can compute, and return the network."""
    graph = network.module.graph
    added = {
        graph_node
        for graph_node in graph.nodes
        if is_quantizer(graph_node) and str(graph_node.args[0]) in network.added
    }
    for node in list(graph.nodes):
        if node.op == "call_function" and not (is_quantizer(node) or is_move(node)):
            _agree_on_type(graph, node)
            _agree_on_grid(graph, node, added)
    graph.eliminate_dead_code()
    network.module.recompile()
    return network


def _agree_on_type(graph: fx.Graph, node: fx.Node) -> None:
    """Let a node of which anything has 16 bits take and make 16 bits alone."""
    behind = quantizer_behind(node)
    sources = list(_operands(node))
    if behind is None or not any(
        grid_of(quantizer).is_wide for quantizer in (behind, *(source for _, source in sources))
    ):
        return
    for operand, source in sources:
        if not (grid := grid_of(source)).is_wide:
            node.replace_input_with(operand, _inserted(graph, operand, _same_steps(grid)))
    if not (grid := grid_of(behind)).is_wide:
        node.replace_all_uses_with(
            wide := insert_quantizer(graph, node, _finer(grid)),
            delete_user_cb=lambda user: user is not wide,
        )


def _agree_on_grid(graph: fx.Graph, node: fx.Node, added: set[fx.Node]) -> None:
    behind = quantizer_behind(node)
    if behind is None:
        return
    grid = grid_of(behind)
    if node.target is CONCATENATION:
        for operand, source in list(_operands(node)):
            if grid_of(source) != grid:
                node.replace_input_with(operand, _inserted(graph, operand, grid))
        return
    wanted = grid
    if node.target in SAME_GRID and node.args[1] != [1, 1]:
        wanted = next(grid_of(source) for _, source in _operands(node))
    elif node.target in UNIT:
        wanted = unit_grid(wide=grid.is_wide)
    elif node.target is aten.tanh.default:
        wanted = sign_grid(wide=grid.is_wide)
    if (wanted.scale, wanted.zero_point) == (grid.scale, grid.zero_point):
        return
    if behind in added:
        set_grid(behind, wanted)
        return
    first = insert_quantizer(graph, node, wanted)
    node.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)


def unit_grid(*, wide: bool) -> ActivationGrid:
    """The grid on which LiteRT gives what lies between 0 and 1."""
    return (
        sign_grid(wide=True)
        if wide
        else ActivationGrid(scale=1 / (BYTE + 1), zero_point=0.0, qmin=0, qmax=BYTE)
    )


def sign_grid(*, wide: bool) -> ActivationGrid:
    """The grid on which LiteRT gives what lies between -1 and 1."""
    middle = ((WORD if wide else BYTE) + 1) // 2
    return ActivationGrid(scale=1 / middle, zero_point=float(middle), qmin=0, qmax=2 * middle - 1)


def quantizer_behind(node: fx.Node) -> fx.Node | None:
    """The quantizer that alone takes the node's values."""
    users = [user for user in node.users if user.target is not aten.sym_size.int]
    return users[0] if len(users) == 1 and is_quantizer(users[0]) else None


def _operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What a node takes of quantized values, each with the quantizer that these come from."""
    operands = (
        node.all_input_nodes[:1]
        if node.target is LINEAR or "conv" in str(node.target)
        else node.all_input_nodes
    )
    for operand in operands:
        if (source := quantized_source(operand)) is not None:
            yield operand, source


def _inserted(graph: fx.Graph, after: fx.Node, grid: ActivationGrid) -> fx.Node:
    quantizer = insert_quantizer(graph, after, grid)
    quantizer.meta = dict(after.meta)
    return quantizer


def _same_steps(grid: ActivationGrid) -> ActivationGrid:
    """16-bit codes of the very values of an 8-bit grid."""
    return replace(grid, zero_point=float(MIDDLE), qmin=0, qmax=WORD)


def _finer(grid: ActivationGrid) -> ActivationGrid:
    """A 16-bit grid that reaches as far as one of 8 bits, in finer steps."""
    reach = max(grid.zero_point - grid.qmin, grid.qmax - grid.zero_point)
    if not reach:
        raise BitscapeError("an activation has no level but zero; calibrate on other images")
    return ActivationGrid(
        scale=grid.scale * reach / (MIDDLE - 1), zero_point=float(MIDDLE), qmin=0, qmax=WORD
    )
