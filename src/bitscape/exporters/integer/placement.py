"""Where quantizers stand in an integer graph: every tensor between integer operators passes one.

Networks are simulated, searched and trained with a quantizer on the input of each layer. Integer runtimes fuse a convolution into one
kernel only if its output, and both operands and the result of every addition, are quantized as well: with the layers' input quantizers
alone, ONNX Runtime is no faster than in float. So, for every tensor made by a convolution, an addition, a pooling or a concatenation:

    one quantizer takes it                  that one stands there already
    ... behind reshapes, slices, padding,   a copy of it moves in front of them: rounding commutes with what only moves values, so
        maxima, concatenation               nothing changes
    several take it, one of 8 bits          all others read from that one; of several, also behind moves, the widest takes the place of
                                            all, as a second rounding to 8 bits changes as much and costs time
    several take it, or an addition does    a new 8-bit quantizer, calibrated on images; all others read from it
    it becomes an output of the network,    none: outputs stay float, whoever else takes the tensor (`float_reads`), and 8 bits would
    or one of 16 bits takes it              undo 16

Linear layers and transposed convolutions keep float results unless all that is made of them passes one quantizer: runtimes can return
those, and the residual streams of transformers tolerate no 8 bits. So does a convolution of 16-bit activations, which runtimes compute
in float. Layers between float operators (softmax, layer norm, GELU) stay as they are.

Some runtimes have integer operators alone. For these everything is quantized: images, outputs, the results of every operator, and the
constants that operators take. Where 16 bits take a tensor, all others read from these.
"""

from collections.abc import Callable, Iterator

import torch
from torch import fx

from bitscape.exporters.integer.graph import (
    CONVOLUTIONS,
    LINEAR,
    TRANSPOSED,
    ActivationGrid,
    grid_of,
    insert_quantizer,
    is_quantizer,
    set_grid,
)

aten = torch.ops.aten
RECTIFIERS = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clip.default,
}
POOLINGS = {
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
}
MIXING = CONVOLUTIONS | TRANSPOSED | POOLINGS | {
    LINEAR,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
}
"""Operators that sum over many values, in which the rounding of one is lost."""
CONCATENATION = aten.cat.default
ELEMENTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
MOVES = {
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.channel_shuffle.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.clone.default,
}
"""Operators whose results are values of their inputs, or zeros; maxima too, for rounding is monotone."""
PLACEHOLDER = ActivationGrid(scale=1.0, zero_point=0.0, qmin=0, qmax=255)


def place_quantizers(
    graph: fx.Graph, is_layer: Callable[[fx.Node], bool], *, everywhere: bool = False
) -> list[fx.Node]:
    """Change `graph` so that every tensor that integer operators make is quantized once; grids are uint8 ones.

    Args:
        graph: quantizers stand on the inputs of layers.
        is_layer: whether a convolution or linear node has integer weights.
        everywhere: quantize what float operators take and make as well, and outputs.

    Returns:
        The new quantizers; their grid is a placeholder until they are calibrated.
    """
    placer = _Placer(graph, is_layer, everywhere=everywhere)
    for node in list(graph.nodes):
        placer.merge_equal(node)
    for node in list(graph.nodes):
        if placer.is_site(node):
            placer.settle(node)
        elif node.op == "placeholder":
            placer.hoist(node)
        elif node.target is LINEAR and is_layer(node) and len((tail := behind_rectifiers(node)).users) == 1:
            placer.hoist(tail)
    return placer.added


def repeat_quantizers(graph: fx.Graph, is_layer: Callable[[fx.Node], bool]) -> None:
    """Put quantizers of moved codes behind the move again, where integer operators take them: exact, and what runtimes expect.

    Not behind zero padding that can become a convolution's own. For after `place_quantizers`, when every quantizer has its grid.
    """
    placer = _Placer(graph, is_layer)
    for node in list(graph.nodes):
        placer.drop_behind_padding(node)
        placer.repeat_behind_move(node)


def is_move(node: fx.Node) -> bool:
    """Whether the node's results are values of its input, or zeros."""
    padding = _pads_zeros(node) or (node.target is aten.pad.default and node.args[2:3] not in ((), ("constant",)))
    return padding or node.target in MOVES or (node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem")


def quantized_source(node: fx.Node) -> fx.Node | None:
    """The quantizer whose values `node` holds, perhaps moved; None if another operator comes first."""
    while is_move(node):
        node = node.all_input_nodes[0]
    return node if is_quantizer(node) else None


class _Placer:
    def __init__(self, graph: fx.Graph, is_layer: Callable[[fx.Node], bool], *, everywhere: bool = False) -> None:
        self.graph = graph
        self.is_layer = is_layer
        self.everywhere = everywhere
        self.added: list[fx.Node] = []
        self._float_reads = set() if everywhere else float_reads(graph)
        self._integer: dict[fx.Node, bool] = {}

    def is_convolution(self, node: fx.Node) -> bool:
        """Whether runtimes compute a convolution in integers: not of 16-bit activations."""
        if node.target not in CONVOLUTIONS or not self.is_layer(node):
            return False
        source = quantized_source(node.all_input_nodes[0])
        return source is None or not grid_of(source).is_wide

    def is_integer(self, node: fx.Node) -> bool:
        """Whether a runtime computes the node's result from codes alone."""
        if node not in self._integer:
            inputs = _operands(node)
            follows = is_move(node) or node.target in RECTIFIERS | POOLINGS | {CONCATENATION} or _is_addition(node)
            derived = follows and bool(inputs) and all(self.is_integer(n) for n in inputs)
            self._integer[node] = _is_narrow(node) or self.is_convolution(node) or derived
        return self._integer[node]

    def is_site(self, node: fx.Node) -> bool:
        """Whether the node makes new values, which need a quantizer behind them."""
        if self.everywhere:
            return _is_constant_operand(node) or (_makes_floats(node) and not is_quantizer(node) and not is_move(node))
        makes = node.target in POOLINGS | {CONCATENATION} or _is_addition(node)
        return self.is_convolution(node) or (makes and self.is_integer(node))

    def merge_equal(self, node: fx.Node) -> None:
        """Let one quantizer stand for all of the same grid on one tensor."""
        first: dict[ActivationGrid, fx.Node] = {}
        for user in [user for user in node.users if is_quantizer(user)]:
            kept = first.setdefault(grid_of(user), user)
            if kept is not user:
                user.replace_all_uses_with(kept)
                self.graph.erase_node(user)

    def settle(self, site: fx.Node) -> None:
        tail = behind_rectifiers(site)
        takers = self._rounding_users(tail)
        wanted = self.everywhere or self.is_convolution(site) or any(map(self._wants_codes, takers))
        if takers and not self.hoist(tail) and wanted:
            self._read_from(self._shared_quantizer(tail), tail)

    def hoist(self, tail: fx.Node) -> bool:
        """Put the one quantizer that everything made of `tail` passes right behind it; False if there is none."""
        sole = self._sole_quantizer(tail)
        if sole is not None and sole not in tail.users:
            self._read_from(insert_quantizer(self.graph, tail, grid_of(sole)), tail)
        return sole is not None

    def _rounding_users(self, node: fx.Node) -> list[fx.Node]:
        """Users that may take rounded values."""
        return [user for user in node.users if user.target is not aten.sym_size.int and (node, user) not in self._float_reads]

    def _sole_quantizer(self, node: fx.Node) -> fx.Node | None:
        """The quantizer that all rounded values of `node` pass, with nothing but moves, maxima and rectifiers before it."""
        while len(users := self._rounding_users(node)) == 1:
            node = users[0]
            if is_quantizer(node):
                return node
            if not (is_move(node) or node.target in RECTIFIERS | {CONCATENATION}):
                return None
        return None

    def _wants_codes(self, user: fx.Node) -> bool:
        return is_quantizer(user) or _is_addition(user) or user.target in POOLINGS | {CONCATENATION}

    def _shared_quantizer(self, tail: fx.Node) -> fx.Node:
        takers = [taker for taker in _takers(tail) if is_quantizer(taker)]
        words = [taker for taker in takers if self.everywhere and grid_of(taker).is_wide]
        wide = words or [taker for taker in takers if grid_of(taker).qmax - grid_of(taker).qmin == 255]
        if not wide:
            self.added.append(insert_quantizer(self.graph, tail, PLACEHOLDER))
            return self.added[-1]
        widest = max(map(grid_of, wide), key=lambda grid: grid.scale)
        for taker in wide:
            if grid_of(taker).zero_point == widest.zero_point:
                set_grid(taker, widest)
        shared = insert_quantizer(self.graph, tail, widest)  # in front of everyone who will read from it
        for user in [user for user in tail.users if user is not shared and is_quantizer(user) and grid_of(user) == widest]:
            user.replace_all_uses_with(shared)
            self.graph.erase_node(user)
        return shared

    def _read_from(self, quantizer: fx.Node, tail: fx.Node) -> None:
        self._integer[quantizer] = True
        for user in list(tail.users):
            if user is not quantizer and (tail, user) not in self._float_reads:
                user.replace_input_with(tail, quantizer)

    def drop_behind_padding(self, node: fx.Node) -> None:
        source = quantized_source(node) if is_move(node) else None
        for user in list(node.users):
            idle = source is not None and is_quantizer(user) and grid_of(user) == grid_of(source)
            if idle and all(is_own_padding(node, layer) and self.is_layer(layer) for layer in user.users):
                user.replace_all_uses_with(node)
                self.graph.erase_node(user)

    def repeat_behind_move(self, node: fx.Node) -> None:
        source = quantized_source(node) if is_move(node) else None
        if source is None or all(is_move(user) or _same_codes(user, source) for user in node.users):
            return
        takers = [user for user in node.users if self._wants_codes(user) or self.is_layer(user)]
        if any(not is_own_padding(node, user) for user in takers):
            self._read_from(insert_quantizer(self.graph, node, grid_of(source)), node)


def behind_rectifiers(node: fx.Node) -> fx.Node:
    """The last of the rectifiers that alone take the node's values, or the node itself."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in RECTIFIERS:
        node = user
    return node


def float_reads(graph: fx.Graph) -> set[tuple[fx.Node, fx.Node]]:
    """Pairs of a node and a user that takes its values as they are, since they become outputs of the network, or codes of 16 bits.

    Between them and the output, or the quantizer of 16 bits, stands no quantizer, and no operator of MIXING. An addition
    is such a user only if outputs alone are made of its result, and nothing else takes the operand: other additions are
    residual edges, which are quantized.
    """
    reads: set[tuple[fx.Node, fx.Node]] = set()
    # Nodes some of whose values become outputs.
    outputs_of = {node for node in graph.nodes if node.op == "output" or (is_quantizer(node) and grid_of(node).is_wide)}
    outputs_only = set(outputs_of)  # ... and nothing else
    for node in reversed(graph.nodes):
        for user in node.users:
            if user in outputs_of and (not _is_addition(user) or (user in outputs_only and len(node.users) == 1)):
                reads.add((node, user))
        passes = not (is_quantizer(node) or node.target in MIXING or node.target is aten.sym_size.int)
        if passes and any((node, user) in reads for user in node.users):
            outputs_of.add(node)
            if outputs_only.issuperset(node.users):
                outputs_only.add(node)
    return reads


def _makes_floats(node: fx.Node) -> bool:
    """Whether the node is an input, or an operator, whose values are floats."""
    value = node.meta.get("val")
    return node.op in ("placeholder", "call_function") and isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_constant_operand(node: fx.Node) -> bool:
    """Whether the node reads a tensor of the network that operators take beside what they compute of images."""
    return node.op == "get_attr" and all(user.target in ELEMENTWISE for user in node.users)


def _is_narrow(node: fx.Node) -> bool:
    return is_quantizer(node) and not grid_of(node).is_wide


def _takers(node: fx.Node) -> Iterator[fx.Node]:
    """Who takes the values of `node`, perhaps moved."""
    for user in node.users:
        yield from _takers(user) if is_move(user) else [user]


def _same_codes(user: fx.Node, source: fx.Node) -> bool:
    if not is_quantizer(user):
        return False
    a, b = grid_of(user), grid_of(source)
    return (a.scale, a.zero_point) == (b.scale, b.zero_point)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors among a node's inputs; sizes of dynamic shapes are inputs too."""
    return list(_tensors(node.args[:1] if node.target is not aten.add.Tensor else node.args))


def _tensors(value: object) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _is_addition(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and len(_operands(node)) == 2 and "alpha" not in node.kwargs


def is_own_padding(node: fx.Node, convolution: fx.Node) -> bool:
    """Whether `node` pads pixels with zeros, as the convolution itself could."""
    if not _pads_zeros(node) or convolution.target not in CONVOLUTIONS:
        return False
    amounts: list[int] = node.args[1]  # type: ignore[assignment]  # last dimension first
    spatial = next(n for n in (1, 2, 3) if f"conv{n}d" in str(convolution.target))
    return not any(amounts[2 * spatial :]) and min(amounts) >= 0


def _pads_zeros(node: fx.Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return len(node.args) < 3 or not node.args[2]
    if node.target is not aten.pad.default:
        return False
    given = node.args[2:]  # mode and value
    return given[:1] in ((), ("constant",)) and not any(given[1:])
