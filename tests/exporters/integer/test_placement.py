"""Graphs made by hand, written as they compute; `x` is the quantized input, q(bits) a layer's own quantizer."""

import operator

import pytest
import torch
from torch import fx

from bitscape.exporters.integer.graph import (
    CONVOLUTIONS,
    FAKE_QUANTIZE,
    LINEAR,
    ActivationGrid,
    grid_of,
    insert_quantizer,
    is_quantizer,
    set_grid,
)
from bitscape.exporters.integer.placement import PLACEHOLDER, is_own_padding, place_quantizers, quantized_source, repeat_quantizers

aten = torch.ops.aten


def unsigned(bits: int, scale: float | None = None) -> ActivationGrid:
    return ActivationGrid(scale=scale or 1.0 / bits, zero_point=0.0, qmin=0, qmax=2**bits - 1)


class Sketch:
    """A graph under construction; layers take their name as weight."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.input = self.graph.placeholder("images")

    def q(self, x: fx.Node, bits: int, scale: float | None = None) -> fx.Node:
        node = self.graph.create_node("call_function", FAKE_QUANTIZE, (x, 1.0, 0.0, 0, 255))
        set_grid(node, unsigned(bits, scale))
        return node

    def conv(self, x: fx.Node, bits: int = 4, name: str = "conv", quantizer: bool = True) -> fx.Node:
        x = self.q(x, bits) if quantizer else x
        return self.graph.create_node("call_function", aten.conv2d.default, (x, self.graph.get_attr("weight")), name=name)

    def linear(self, x: fx.Node, bits: int = 4) -> fx.Node:
        return self.graph.create_node("call_function", LINEAR, (self.q(x, bits), self.graph.get_attr("weight")))

    def __call__(self, target, *args, name: str | None = None) -> fx.Node:
        return self.graph.create_node("call_function", target, args, name=name)

    def relu(self, x: fx.Node) -> fx.Node:
        return self(aten.relu.default, x, name=f"r_{x.name}")

    def placed(self, *outputs: fx.Node) -> list[fx.Node]:
        """The quantizers that are added, once the graph is finished and looked over."""
        self.graph.output(outputs)
        added = place_quantizers(self.graph, is_layer)
        for node in added:
            assert grid_of(node) == PLACEHOLDER
            set_grid(node, unsigned(8, scale=0.5))
        repeat_quantizers(self.graph, is_layer)
        self.graph.lint()
        return added

    def quantizers(self) -> list[tuple[str, int]]:
        """Every quantizer, in order: what it stands on, and its largest code."""
        return [(str(node.args[0]), grid_of(node).qmax) for node in self.graph.nodes if is_quantizer(node)]


def is_layer(node: fx.Node) -> bool:
    return node.target in {*CONVOLUTIONS, LINEAR}


def takers(node: fx.Node) -> set[str]:
    return {user.name for user in node.users}


@pytest.fixture
def g() -> Sketch:
    return Sketch()


def test_a_chain_keeps_the_quantizers_it_has(g):
    a = g.relu(g.conv(g.input, 8, "a"))
    b = g.relu(g.conv(a, 3, "b"))
    assert g.placed(g.linear(g(aten.view.default, b, [-1, 8], name="view"), 5)) == []
    # The last one moves in front of the view, behind which it is repeated.
    assert g.quantizers() == [("images", 255), ("r_a", 7), ("r_b", 31), ("view", 31)]


def test_a_convolution_is_quantized_also_before_a_float_operator_but_not_before_the_output(g):
    a = g.conv(g.input, 8, "a")
    b = g.conv(g(aten.silu.default, a, name="silu"), 4, "b")
    (added,) = g.placed(b)
    assert str(added.args[0]) == "a" and takers(added) == {"silu"}
    assert takers(b) == {"output"}


def test_a_rectifier_belongs_to_the_convolution_in_front_of_it(g):
    six = g(aten.relu6.default, g.conv(g.input, 8, "a"), name="six")
    (added,) = g.placed(g.linear(g(aten.silu.default, six)))
    assert added.args[0] is six


@pytest.mark.parametrize(
    "move",
    [
        (aten.max_pool2d.default, [2, 2]),
        (aten.max_pool1d.default, [2]),
        (aten.view.default, [-1, 4]),
        (aten._unsafe_view.default, [-1, 4]),
        (aten.permute.default, [0, 2, 1]),
        (aten.slice.Tensor, 1, 0, 2),
        (aten.select.int, 1, 0),
        (aten.channel_shuffle.default, 2),
        (aten.pixel_shuffle.default, 2),
        (aten.upsample_nearest2d.vec, None, [2.0, 2.0]),
        (aten.constant_pad_nd.default, [1, 1]),
        (aten.pad.default, [1, 1]),
        (aten.pad.default, [1, 1], "constant", 0.0),
        (aten.pad.default, [1, 1], "reflect"),
    ],
    ids=str,
)
def test_rounding_moves_in_front_of_what_moves_values(g, move):
    target, *settings = move
    moved = g(target, g.relu(g.conv(g.input, 8, "a")), *settings, name="moved")
    assert g.placed(g.linear(moved, 3)) == []
    assert g.quantizers() == [("images", 255), ("r_a", 7), ("moved", 7)]


@pytest.mark.parametrize(
    "operator_",
    [(aten.constant_pad_nd.default, [1, 1], 1.0), (aten.pad.default, [1, 1], "constant", 1.0), (aten.sigmoid.default,)],
    ids=str,
)
def test_rounding_does_not_move_in_front_of_what_makes_values(g, operator_):
    target, *settings = operator_
    made = g(target, g.conv(g.input, 8, "a"), *settings, name="made")
    (added,) = g.placed(g.linear(made, 3))
    assert added.args[0].name == "a"
    assert g.quantizers() == [("images", 255), ("a", 255), ("made", 7)]


def test_a_fire_module_needs_no_quantizer_of_its_own(g):
    squeezed = g.relu(g.conv(g.input, 8, "squeeze"))
    both = [g.relu(g.conv(squeezed, 4, name)) for name in ("left", "right")]
    joined = g(aten.cat.default, both, 1, name="joined")
    pooled = g(aten.max_pool2d.default, joined, [3, 3], [2, 2], name="pooled")
    assert g.placed(g.linear(pooled, 5)) == []
    # One for both branches, one behind each, and again behind the concatenation and the pooling.
    expected = [("images", 255), ("r_squeeze", 15), ("r_left", 31), ("r_right", 31), ("joined", 31), ("pooled", 31)]
    assert g.quantizers() == expected


def test_branches_of_other_bits_share_an_added_quantizer(g):
    squeezed = g.relu(g.conv(g.input, 8, "squeeze"))
    left, right = g.conv(squeezed, 4, "left"), g.conv(squeezed, 3, "right")
    added = g.placed(left, right)
    assert [str(node.args[0]) for node in added] == ["r_squeeze"]
    assert {grid_of(node).qmax for node in added[0].users} == {15, 7}


def test_branches_of_equal_grids_share_one(g):
    squeezed = g.relu(g.conv(g.input, 8, "squeeze"))
    left, right = (g.linear(g.conv(squeezed, 4, name), 8) for name in ("left", "right"))
    assert g.placed(left, right) == []
    assert g.quantizers() == [("images", 255), ("r_squeeze", 15), ("left", 255), ("right", 255)]


def test_a_residual_edge_gets_one_quantizer(g):
    x = g.relu(g.conv(g.input, 8, "stem"))
    body = g.conv(g.relu(g.conv(x, 4, "first")), 4, "second")
    total = g.relu(g(aten.add.Tensor, body, x, name="total"))
    last = g.linear(g(aten.mean.dim, total, [2, 3], name="mean"), 4)
    added = g.placed(last)
    # One of the stem's output, for the addition and "first", which rounds once more; the other operand; the sum, for pooling takes it.
    assert [str(node.args[0]) for node in added] == ["r_stem", "second", "r_total"]
    assert takers(added[0]) == {"total", "fake_quantize_default_1"} and takers(added[1]) == {"total"} and takers(added[2]) == {"mean"}
    assert [bits for _, bits in g.quantizers()] == [255, 255, 15, 15, 255, 255, 15]


def test_an_input_quantizer_of_8_bits_serves_the_residual_edge(g):
    x = g.relu(g.conv(g.input, 8, "stem"))
    body = g.conv(x, 8, "body")
    added = g.placed(g.linear(g(aten.add.Tensor, x, body, name="total"), 4))
    assert [str(node.args[0]) for node in added] == ["body"]
    shared = next(node for node in g.graph.nodes if is_quantizer(node) and str(node.args[0]) == "r_stem")
    assert takers(shared) == {"body", "total"}


def test_of_several_quantizers_of_8_bits_the_widest_takes_the_place_of_all(g):
    x = g.relu(g.conv(g.input, 8, "stem"))
    layers = [
        g.graph.create_node("call_function", aten.conv2d.default, (g.q(x, 8, scale), g.graph.get_attr(f"weight_{name}")), name=name)
        for name, scale in (("a", 0.1), ("b", 0.3), ("c", 0.2))
    ]
    assert g.placed(*layers) == []
    (shared,) = (node for node in g.graph.nodes if is_quantizer(node) and str(node.args[0]) == "r_stem")
    assert takers(shared) == {"a", "b", "c"} and grid_of(shared).scale == 0.3


def test_the_serving_quantizer_comes_before_all_who_take_it(g):
    x = g.relu(g.conv(g.input, 8, "stem"))
    negative = g(aten.neg.default, x, name="negative")  # in front of the quantizer, in the order of the graph
    added = g.placed(g.conv(x, 8, "body"), g.linear(negative))
    order = {node: i for i, node in enumerate(g.graph.nodes)}
    shared = next(node for node in order if is_quantizer(node) and str(node.args[0]) == "r_stem")
    assert takers(shared) == {"negative", "body"} and order[shared] < order[negative]
    assert added == []


def test_a_sum_that_a_quantizer_takes_needs_none(g):
    a, b = (g.conv(g.input, 8, name) for name in "ab")
    total = g.relu(g(aten.add.Tensor, a, b, name="total"))
    added = g.placed(g.linear(total, 3))
    assert [str(node.args[0]) for node in added] == ["a", "b"]
    assert g.quantizers() == [("images", 255), ("a", 255), ("b", 255), ("r_total", 7)]


def test_the_residual_stream_of_a_transformer_stays_float(g):
    x = g.linear(g.input, 8)
    y = g.linear(g(aten.gelu.default, g.linear(g(aten.layer_norm.default, x, [4]), 4)), 4)
    assert g.placed(g(aten.add.Tensor, x, y)) == []


def test_sums_with_numbers_or_scaled_ones_are_float_operators(g):
    a = g.conv(g.input, 8, "a")
    shifted = g(aten.add.Tensor, a, 1.0, name="shifted")
    scaled = g.graph.create_node("call_function", aten.add.Tensor, (a, a), {"alpha": 2}, name="scaled")
    added = g.placed(g.linear(shifted), g.linear(scaled))
    assert [str(node.args[0]) for node in added] == ["a"]


def test_float_convolutions_are_left_alone(g):
    x = g.conv(g.input, 8, "a")
    float_one = g.graph.create_node("call_function", aten.conv2d.default, (x, g.graph.get_attr("other")), name="float_one")
    g.graph.output((float_one,))
    added = place_quantizers(g.graph, lambda node: node.name == "a")
    assert [str(node.args[0]) for node in added] == ["a"]


def test_parts_of_a_split_are_found_again(g):
    x = g.relu(g.conv(g.input, 8, "a"))
    parts = g(aten.split.Tensor, x, 2, 1, name="parts")
    left, right = (g(operator.getitem, parts, i, name=f"part{i}") for i in range(2))
    joined = g(aten.cat.default, [left, g.conv(right, 4, "b")], 1, name="joined")
    (a, b) = g.placed(g.linear(g(aten.silu.default, joined)))
    assert [str(node.args[0]) for node in (a, b)] == ["r_a", "b"]
    # The concatenation takes codes: the passing half is quantized again, as what stands behind the split.
    assert ("part0", 255) in g.quantizers()
    assert quantized_source(left) is a


def test_what_reads_the_size_of_a_tensor_takes_no_part(g):
    x = g.relu(g.conv(g.input, 8, "a"))
    size = g(aten.sym_size.int, g.input, 0)
    assert g.placed(g.linear(g(aten.view.default, x, [size, 4]), 3)) == []


@pytest.mark.parametrize(
    ("amounts", "own"), [([1, 1], True), ([0, 1, 2, 3], True), ([0, 0, 0, 0, 1, 1], False), ([1, 1, 1, 1, 0, 0], True), ([-1, 0], False)]
)
def test_zero_padding_of_pixels_becomes_the_convolutions_own(g, amounts, own):
    padded = g(aten.constant_pad_nd.default, g.q(g.input, 8), amounts, name="padded")
    conv = g.conv(padded, name="a", quantizer=False)
    assert is_own_padding(padded, conv) is own
    g.placed(conv)
    assert [source for source, _ in g.quantizers()] == (["images"] if own else ["images", "padded"])


def test_padding_outside_a_layer_becomes_its_own_as_well(g):
    """nn.ZeroPad2d: the layer's quantizer moves in front of it, and none stays behind."""
    a = g.relu(g.conv(g(aten.constant_pad_nd.default, g.input, [1, 1], name="around"), 8, "a"))
    conv = g.conv(g(aten.constant_pad_nd.default, a, [0, 1, 0, 1], name="inside"), 3, "b")
    assert g.placed(conv) == []
    assert g.quantizers() == [("images", 255), ("r_a", 7)]
    assert str(conv.args[0]) == "inside"


def test_padding_with_other_values_is_not_the_convolutions_own(g):
    for settings in (([1, 1], "reflect"), ([1, 1], "constant", 1.0)):
        padded = g(aten.pad.default, g.q(g.input, 8), *settings)
        assert not is_own_padding(padded, g.conv(padded, quantizer=False))
    assert not is_own_padding(g(aten.pad.default, g.input, [1, 1]), g.linear(g.input))


def test_a_layers_input_is_quantized_behind_what_its_own_forward_moves(g):
    moved = g(aten.transpose.int, g.q(g.input, 5), 1, 2, name="moved")
    out = g.graph.create_node("call_function", LINEAR, (moved, g.graph.get_attr("weight")))
    assert g.placed(out) == []
    assert g.quantizers() == [("images", 31), ("moved", 31)]


def test_copies_take_the_grid_that_calibration_found(g):
    """They are made after it: a copy of the placeholder would round to whole numbers."""
    x = g.conv(g.input, 8, "a")
    tokens = g(aten.transpose.int, x, 1, 2, name="tokens")
    g.placed(g.linear(g(aten.silu.default, g(aten.cat.default, [g.graph.get_attr("token"), tokens], 1))))
    grids = {str(node.args[0]): grid_of(node) for node in g.graph.nodes if is_quantizer(node)}
    assert grids["a"] == grids["tokens"] == unsigned(8, scale=0.5)


class TestOutputs:
    """They stay float: no quantizer stands between the last layer and the output."""

    @pytest.mark.parametrize(
        "operators",
        [
            [],
            [(aten.relu.default,)],
            [(aten.reshape.default, [-1, 4]), (aten.permute.default, [1, 0])],
            [(aten.sigmoid.default,), (aten.mul.Tensor, 8.0)],
            [(aten.upsample_bilinear2d.vec, None, False, [2.0, 2.0])],
            [(aten.max_pool2d.default, [2, 2]), (aten.softmax.int, 1)],
        ],
        ids=str,
    )
    def test_nothing_is_rounded_behind_the_last_convolution(self, g, operators):
        x = g.conv(g.relu(g.conv(g.input, 8, "a")), 4, "last")
        for target, *settings in operators:
            x = g(target, x, *settings)
        assert g.placed(x) == []
        assert g.quantizers() == [("images", 255), ("r_a", 15)]

    def test_heads_that_are_joined(self, g):
        x = g.relu(g.conv(g.input, 8, "a"))
        joined = g(aten.cat.default, [g.conv(x, 8, "left"), g.conv(x, 8, "right")], 1)
        assert g.placed(joined) == []

    def test_heads_that_are_added(self, g):
        x = g.relu(g.conv(g.input, 8, "a"))
        assert g.placed(g(aten.add.Tensor, g.conv(x, 8, "left"), g.conv(x, 8, "right"))) == []

    def test_features_that_a_layer_takes_as_well(self, g):
        """The layer's own quantizer is enough for it."""
        x = g.relu(g.conv(g.input, 8, "a"))
        head = g.linear(x, 3)
        assert g.placed(x, head) == []
        assert takers(x) == {"output", str(head.args[0])} and g.quantizers() == [("images", 255), ("r_a", 7)]

    def test_features_that_several_layers_take_as_well(self, g):
        x = g.relu(g.conv(g.input, 8, "a"))
        (added,) = g.placed(x, g.linear(x, 3), g.linear(x, 4))
        assert added.args[0] is x and takers(x) == {"output", added.name} and len(added.users) == 2

    def test_what_moves_features_to_an_output_and_to_a_layer_moves_floats(self, g):
        pooled = g(aten.max_pool2d.default, g.relu(g.conv(g.input, 8, "a")), [2, 2], name="pooled")
        assert g.placed(pooled, g.linear(pooled, 3)) == []
        assert g.quantizers() == [("images", 255), ("pooled", 7)]

    def test_the_sum_of_a_residual_block_is_float_as_an_output_and_its_operands_are_codes(self, g):
        x = g.relu(g.conv(g.input, 8, "stem"))
        total = g.relu(g(aten.add.Tensor, x, g.conv(x, 8, "body"), name="total"))
        added = g.placed(total, g.linear(total, 4))
        assert [str(node.args[0]) for node in added] == ["body"]
        assert "output" in takers(total)
        assert g.quantizers() == [("images", 255), ("r_stem", 255), ("body", 255), ("r_total", 15)]

    def test_the_shortcut_of_a_last_residual_block_stays_an_edge_of_codes(self, g):
        x = g.relu(g.conv(g.input, 8, "stem"))
        body = g.conv(x, 8, "body")
        total = g(aten.add.Tensor, x, body, name="total")
        assert g.placed(total) == []
        assert takers(body) == {"total"} and takers(x) != {"total"}
        assert g.quantizers() == [("images", 255), ("r_stem", 255)]

    def test_a_pooling_takes_codes(self, g):
        """SqueezeNet: the last convolution stays one of integers, and the mean of its codes is float."""
        mean = g(aten.mean.dim, g.relu(g.conv(g.input, 8, "a")), [2, 3], name="mean")
        assert [str(node.args[0]) for node in g.placed(mean)] == ["r_a"]

    def test_one_tensor_may_be_two_outputs_and_an_output_may_be_the_image(self, g):
        x = g.conv(g.input, 8, "a")
        assert g.placed(x, x, g.input) == []
        assert takers(g.input) == {"output", str(x.args[0])}


def test_placing_twice_adds_nothing(g):
    x = g.relu(g.conv(g.input, 8, "stem"))
    g.placed(g.conv(g(aten.add.Tensor, x, g.conv(x, 4, "body")), 4, "last"))
    before = g.quantizers()
    assert place_quantizers(g.graph, is_layer) == []
    repeat_quantizers(g.graph, is_layer)
    assert g.quantizers() == before


def test_a_new_quantizer_has_no_takers_yet(g):
    x = g.relu(g.input)
    g.graph.output((x,))
    assert not insert_quantizer(g.graph, x, unsigned(8)).users


def test_a_quantizer_of_8_bits_behind_a_move_serves_all_who_take_the_tensor(g):
    """A second one of 8 bits right behind it would be merged with the first by ONNX Runtime, which then scales by the wrong one."""
    x = g.relu(g.conv(g.input, 8, "stem"))
    moved = g.q(g(aten.max_pool2d.default, x, [2, 2]), 8, 0.3)
    layer = g.graph.create_node("call_function", aten.conv2d.default, (moved, g.graph.get_attr("weight_a")), name="a")
    negative = g(aten.neg.default, x, name="negative")
    assert g.placed(layer, g(aten.matmul.default, negative, negative)) == []
    (shared,) = (node for node in g.graph.nodes if is_quantizer(node) and str(node.args[0]) == "r_stem")
    assert grid_of(shared).scale == 0.3 and "negative" in takers(shared)


def test_a_linear_layer_in_front_of_a_concatenation_gives_codes(g):
    a = g.relu(g.conv(g.input, 8, "a"))
    b = g.relu(g.linear(g.input, 4))
    joined = g(aten.cat.default, [a, b], 1, name="joined")
    assert g.placed(g.linear(joined, 5)) == []
    assert g.quantizers() == [("images", 255), ("r_a", 31), ("images", 15), ("r_linear_default", 31), ("joined", 31)]
    assert all(is_quantizer(part) for part in joined.args[0])


def test_a_linear_layer_whose_values_go_several_ways_stays_float(g):
    b = g.linear(g.input, 4)
    first, second = (g(aten.view.default, b, [-1, 8], name=name) for name in ("first", "second"))
    assert g.placed(g.linear(first, 5), g(aten.silu.default, second)) == []
    assert g.quantizers() == [("images", 15), ("first", 31)]
