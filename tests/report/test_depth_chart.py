import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest

from bitscape.policy import LayerBits
from bitscape.report.depth_chart import BIT, LARGEST, PLAIN, SMALLEST, DepthLayer, depth_chart
from tests.report.reading import Element, numbers, parts, texts, tips


def layer(name: str, bits: LayerBits, **changed: Any) -> DepthLayer:
    plain = DepthLayer(name=name, bits=bits, least=bits, uniform=None, series=0, costs=None)
    return replace(plain, **changed)


def drawn(*layers: DepthLayer) -> Element:
    return ElementTree.fromstring(depth_chart("Bits", layers))


def stems(root: Element, css: str) -> list[float]:
    """Heights in bits."""
    ends = [numbers(each, "y1", "y2") for each in parts(root, "line", css)]
    return [(low - high) / BIT for low, high in ends]


def test_discs_stand_at_the_bits_and_their_area_is_the_cost() -> None:
    root = drawn(
        layer("a", LayerBits(2, 8), costs=((25.0, "25 B"), (0.0, "0 BitOps"))),
        layer("b", LayerBits(8, 4), costs=((100.0, "100 B"), (7.0, "7 BitOps")), series=1),
    )
    assert stems(root, "s0 stem") == [2, 8] and stems(root, "s1 stem") == [8, 4]
    small, none = (numbers(each, "r")[0] for each in parts(root, "circle", "s0 disc"))
    large, one = (numbers(each, "r")[0] for each in parts(root, "circle", "s1 disc"))
    assert math.pi * large**2 == pytest.approx(4 * math.pi * small**2, rel=1e-3)
    assert (large, one, none) == (LARGEST, LARGEST, SMALLEST)
    assert {"a: 2 weight bits, 25 B", "b: 4 activation bits, 7 BitOps"} <= set(tips(root))
    assert "weight bits; area of a disc: weight bytes" in texts(root)


def test_without_a_network_all_discs_are_alike() -> None:
    root = drawn(layer("a", LayerBits(2, 8)), layer("b", LayerBits(8, 4)))
    assert {numbers(each, "r")[0] for each in parts(root, "circle", "s0 disc")} == {PLAIN}
    assert "weight bits" in texts(root)
    words = ElementTree.tostring(root, "unicode")
    assert "2 layers in call order: weight bits from 2 to 8, activation bits from 4 to 8." in words


def test_what_images_decide_about_is_light() -> None:
    root = drawn(layer("a", LayerBits(4, 4), least=LayerBits(4, 3)))
    (light,) = parts(root, "rect", "s0 light")
    assert numbers(light, "height") == [BIT]
    assert stems(root, "s0 stem") == [4, 3]
    assert "3-4" in texts(root) and "a: 3-4 activation bits" in tips(root)


def test_uniform_bits_are_a_dashed_line_at_their_height() -> None:
    uniform = LayerBits(4, 8)
    layers = (layer(name, LayerBits(4, 4), uniform=uniform) for name in "ab")
    root = drawn(*layers)
    weights, activations = parts(root, "polyline", "uniform curve")
    levels = {pair.split(",")[1] for pair in weights.get("points", "").split()}
    discs = [numbers(each, "cy")[0] for each in parts(root, "circle", "s0 disc")]
    assert {float(level) for level in levels} == {discs[0]}
    (level,) = {float(pair.split(",")[1]) for pair in activations.get("points", "").split()}
    assert discs[-1] - level == 4 * BIT


def test_layers_that_stay_float_reach_the_top() -> None:
    root = drawn(layer("a", LayerBits.FLOAT), layer("b", LayerBits(8, 16)))
    assert stems(root, "s0 stem") == [16, 8, 16, 16]
    assert texts(root).count("32") == 2
