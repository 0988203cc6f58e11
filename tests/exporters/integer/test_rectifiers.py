import pytest
import torch
from torch import fx

from bitscape.exporters.integer.graph import FAKE_QUANTIZE, ActivationGrid, grid_of, set_grid
from bitscape.exporters.integer.rectifiers import absorb_rectifiers, loosen_limits

aten = torch.ops.aten


def grid(scale=0.1, zero_point=0.0, qmin=0, qmax=255) -> ActivationGrid:
    return ActivationGrid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)


def behind_rectifiers(quantizer: ActivationGrid, *rectifiers) -> tuple[fx.GraphModule, fx.GraphModule]:
    """x -> rectifiers -> quantizer, as it is and with the rectifiers absorbed."""

    def build() -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        for target, *settings in rectifiers:
            x = graph.call_function(target, (x, *settings))
        node = graph.call_function(FAKE_QUANTIZE, (x, 1.0, 0.0, 0, 255))
        set_grid(node, quantizer)
        graph.output(node)
        return fx.GraphModule({}, graph)

    plain, absorbed = build(), build()
    absorb_rectifiers(absorbed.graph)
    absorbed.graph.eliminate_dead_code()
    absorbed.recompile()
    return plain, absorbed


RECTIFIERS = [
    [(aten.relu.default,)],
    [(aten.relu6.default,)],
    [(aten.hardtanh.default,)],
    [(aten.hardtanh.default, 0.0, 6.0)],
    [(aten.hardtanh.default, -2, 2)],
    [(aten.clamp.default, 0)],
    [(aten.clamp.default, None, 1.5)],
    [(aten.clamp.default, 0.5, 1.5)],
    [(aten.clip.default, -0.25, None)],
    [(aten.clamp_min.default, 0.3)],
    [(aten.relu.default,), (aten.clamp.default, None, 3.0)],
]
GRIDS = [grid(), grid(qmax=15), grid(0.0213, 128.0), grid(0.31, 128.0, 126, 129), grid(0.05, 37.0), grid(6 / 255), grid(0.04, 0.0, 2, 9)]


class TestRectifiers:
    @pytest.mark.parametrize("rectifiers", RECTIFIERS, ids=str)
    @pytest.mark.parametrize("quantizer", GRIDS, ids=str)
    def test_quantizers_cut_off_exactly_what_rectifiers_do(self, rectifiers, quantizer):
        plain, absorbed = behind_rectifiers(quantizer, *rectifiers)
        targets = [node.target for node in absorbed.graph.nodes if node.op == "call_function"]
        assert targets == [FAKE_QUANTIZE]
        edges = (torch.arange(-3, 260) - quantizer.zero_point + 0.5) * quantizer.scale  # between any two codes, and next to it
        x = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1), torch.linspace(-9, 9, 2001)])
        assert torch.equal(plain(x), absorbed(x))

    def test_a_rectifier_that_others_need_stays_for_them(self):
        graph = fx.Graph()
        relu = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
        node = graph.call_function(FAKE_QUANTIZE, (relu, 1.0, 128.0, 0, 255))
        graph.output((node, relu))
        absorb_rectifiers(graph)
        assert list(relu.users) == [next(iter(graph.find_nodes(op="output")))] and grid_of(node).qmin == 128

    @pytest.mark.parametrize(
        ("rectifier", "source", "needed"),
        [
            (aten.relu.default, grid(), False),
            (aten.relu.default, grid(zero_point=128.0), True),
            (aten.relu.default, grid(zero_point=128.0, qmin=128), False),
            (aten.relu6.default, grid(6 / 255), False),
            (aten.relu6.default, grid(6.1 / 255), True),
            (aten.relu6.default, grid(6.1 / 255, qmax=250), False),
            (aten.hardtanh.default, grid(1 / 127, 128.0, 1), False),
            (aten.hardtanh.default, grid(1 / 127, 128.0), True),
        ],
    )
    def test_one_behind_a_quantizer_goes_if_it_cuts_off_nothing(self, rectifier, source, needed):
        graph = fx.Graph()
        node = graph.call_function(FAKE_QUANTIZE, (graph.placeholder("x"), 1.0, 0.0, 0, 255))
        set_grid(node, source)
        graph.output(graph.call_function(rectifier, (graph.call_function(aten.view.default, (node, [-1])),)))
        absorb_rectifiers(graph)
        graph.eliminate_dead_code()
        assert (rectifier in {node.target for node in graph.nodes}) is needed

    def test_padding_between_may_bring_a_zero_that_the_grid_lacks(self):
        graph = fx.Graph()
        node = graph.call_function(FAKE_QUANTIZE, (graph.placeholder("x"), 0.1, 0.0, 5, 255))
        padded = graph.call_function(aten.constant_pad_nd.default, (node, [1, 1]))
        graph.output(graph.call_function(aten.clamp_min.default, (padded, 0.5)))
        absorb_rectifiers(graph)
        assert aten.clamp_min.default in {node.target for node in graph.nodes if node.users}


class TestLimits:
    """Limits of quantizers that repeat others'."""

    def limits(self, first: ActivationGrid, second: ActivationGrid, between=()) -> tuple[int, int]:
        graph = fx.Graph()
        x = graph.call_function(FAKE_QUANTIZE, (graph.placeholder("x"), 1.0, 0.0, 0, 255))
        set_grid(x, first)
        for target, *settings in between:
            x = graph.call_function(target, (x, *settings))
        again = graph.call_function(FAKE_QUANTIZE, (x, 1.0, 0.0, 0, 255))
        set_grid(again, second)
        loosen_limits(graph)
        return grid_of(again).qmin, grid_of(again).qmax

    def test_the_second_of_two_equal_ones_cuts_off_nothing(self):
        few = grid(qmax=15)
        assert self.limits(few, few) == (0, 255)
        moved = [(aten.view.default, [-1]), (aten.constant_pad_nd.default, [1, 1])]
        assert self.limits(few, few, moved) == (0, 255)
        assert self.limits(grid(qmax=7), few) == (0, 255)

    def test_it_keeps_limits_that_cut(self):
        few = grid(qmax=15)
        assert self.limits(grid(), few) == (0, 15)
        assert self.limits(grid(scale=0.2, qmax=15), few) == (0, 15)
        assert self.limits(grid(zero_point=1.0, qmax=15), few) == (0, 15)
        assert self.limits(few, few, [(aten.sigmoid.default,)]) == (0, 15)
        above = grid(qmin=3, qmax=15)
        assert self.limits(above, above) == (3, 15)  # padding might bring zeros in

    def test_all_parts_of_a_concatenation_count(self):
        for parts, expected in (([grid(qmax=15)] * 2, (0, 255)), ([grid(qmax=15), grid()], (0, 15))):
            graph = fx.Graph()
            nodes = [graph.call_function(FAKE_QUANTIZE, (graph.placeholder(name), 1.0, 0.0, 0, 255)) for name in "ab"]
            for node, part in zip(nodes, parts, strict=True):
                set_grid(node, part)
            again = graph.call_function(FAKE_QUANTIZE, (graph.call_function(aten.cat.default, (nodes, 1)), 1.0, 0.0, 0, 255))
            set_grid(again, grid(qmax=15))
            loosen_limits(graph)
            assert (grid_of(again).qmin, grid_of(again).qmax) == expected
