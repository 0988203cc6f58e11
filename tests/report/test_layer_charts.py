import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest

from bitscape.policy import LayerBits
from bitscape.report.layer_charts import (
    BAR_HEIGHT,
    CELL,
    LEFT,
    LONGEST,
    NARROWEST,
    WIDEST,
    bits_panels,
    drawn_scores,
    score_map,
    shade_of,
    share_panels,
)
from bitscape.report.svg import NAMESPACE
from bitscape.searches.scores import ScoreTable
from tests.report.made import policy, scores

Element = ElementTree.Element


def rects(root: Element, css: str) -> list[Element]:
    return [each for each in root.iter(f"{{{NAMESPACE}}}rect") if each.get("class") == css]


def texts(root: Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{{{NAMESPACE}}}text")]


def tips(root: Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{{{NAMESPACE}}}title")][1:]


def heights(found: list[Element]) -> list[float]:
    return [float(each.get("height", "")) for each in found]


def test_bars_are_as_high_as_their_bits() -> None:
    root = ElementTree.fromstring(bits_panels("Bits", policy().layers))
    for css, widths in (("weights", [8, 2, 4, 8]), ("activations", [8, 4, 2, 8])):
        assert heights(rects(root, css)) == [BAR_HEIGHT * bits / 8 for bits in widths]
    assert tips(root)[1] == "second: 2 weight bits"
    assert set(policy().layers) <= set(texts(root))
    assert "4 layers in call order: weight bits from 2 to 8, activation bits from 2 to 8." in ElementTree.tostring(root, "unicode")


def test_what_images_decide_about_is_light() -> None:
    root = ElementTree.fromstring(bits_panels("Bits", policy().layers, {"second": LayerBits(2, 3)}))
    (light,) = rects(root, "activations light")
    assert float(light.get("height", "")) == BAR_HEIGHT * (4 - 3) / 8
    assert "3-4" in texts(root) and "second: 3-4 activation bits" in tips(root)


@pytest.mark.parametrize("count", [1, 20, 60, 200])
def test_columns_have_room_for_their_names_and_all_lies_in_the_picture(count: int) -> None:
    names = [f"features.{at}.conv.project.and.a.very.long.name" for at in range(count)]
    root = ElementTree.fromstring(bits_panels("Bits", dict.fromkeys(names, LayerBits(8, 8))))
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    turned = [each for each in root.iter(f"{{{NAMESPACE}}}text") if each.get("transform")]
    places = [float(each.get("x", "")) for each in turned]
    assert len(places) == count
    assert all(later - earlier >= NARROWEST - 0.11 for earlier, later in pairwise(places))  # places are rounded
    assert places[0] > LEFT and places[-1] < width
    assert all(len(each.text or "") <= LONGEST for each in turned)
    assert float(turned[0].get("y", "")) + 6 * LONGEST <= height
    for each in root.iter(f"{{{NAMESPACE}}}rect"):
        assert float(each.get("x", "")) >= 0 and float(each.get("x", "")) + float(each.get("width", "")) <= width
        assert float(each.get("y", "")) >= 0 and float(each.get("y", "")) + float(each.get("height", "")) <= height


def test_shares_are_drawn_to_the_largest() -> None:
    root = ElementTree.fromstring(
        share_panels("Cost", {"BitOps": {"a": (75.0, "3 M"), "b": (25.0, "1 M")}, "bytes": {"a": (0.5, "1 B"), "b": (99.5, "2 B")}})
    )
    assert heights(rects(root, "work")) == pytest.approx([BAR_HEIGHT, BAR_HEIGHT / 3], abs=0.1)
    assert "a: 75.00 % of BitOps, 3 M" in tips(root)
    assert "75" in texts(root) and "0" in texts(root)
    assert "b has the largest share of bytes, 99.5 %" in ElementTree.tostring(root, "unicode")


def test_shades_are_even_in_the_logarithm() -> None:
    assert [shade_of(value, 1e-6, 1.0) for value in (0.0, 1e-7, 1e-6, 1.1e-3, 0.9e-3, 1.0, math.inf)] == [
        "c0",
        "c0",
        "c0",
        "c6",
        "c5",
        "c11",
        "none",
    ]
    assert shade_of(2.0, 2.0, 2.0) == "c0"


def test_the_scale_spans_six_decades_at_most_and_negative_scores_count_from_the_best() -> None:
    assert drawn_scores(scores())[1:] == (0.01, 2.0)
    pairs = (LayerBits(2, 2), LayerBits(4, 4))
    wide = ScoreTable(("a",), pairs, np.array([[10.0, 1e-9]]), "fisher")
    assert drawn_scores(wide)[1:] == (pytest.approx(1e-5), 10.0)
    negative = ScoreTable(("a", "b"), pairs, np.array([[-1.0, -3.0], [5.0, 4.0]]), "differentiable")
    assert drawn_scores(negative) == ([[2.0, 0.0], [1.0, 0.0]], 1.0, 2.0)
    nothing = ScoreTable(("a",), pairs, np.array([[0.0, 0.0]]), "fisher")
    assert drawn_scores(nothing)[1:] == (1.0, 1.0)


def cells(root: Element, css: str) -> list[tuple[float, float]]:
    """Columns and rows of the cells of a class, from 0."""
    found = [each.get("d", "") for each in root.iter(f"{{{NAMESPACE}}}path") if each.get("class") == css]
    corners = [tuple(map(float, pair.split())) for text in found for pair in re.findall(r"M([\d.]+ [\d.]+)h", text)]
    return [(x - LEFT, (y - 52) / CELL) for x, y in corners]


def test_each_score_has_its_cell_and_the_chosen_ones_a_frame() -> None:
    table = scores()
    root = ElementTree.fromstring(score_map("Scores", table, policy().layers))
    assert sum(len(cells(root, f"c{at}")) for at in range(12)) == 8
    step = WIDEST
    assert cells(root, "c11") == [(step, 0)]  # 2.0 of third at 2/2, the largest
    assert (cells(root, "c0"), cells(root, "c1")) == ([(0, 1)], [(step, 1)])  # 0.01 and 0.02, of a scale from 0.01 to 2
    assert cells(root, "frame") == [(0, 2), (step, 3)]  # second at 2/4, third at 4/2
    assert [words for words in texts(root) if "/" in words] == ["2/2", "4/4", "2/4", "4/2"]


def test_forbidden_pairs_look_otherwise() -> None:
    table = ScoreTable(("a",), (LayerBits(2, 2), LayerBits(4, 4)), np.array([[math.inf, 0.5]]), "fisher")
    root = ElementTree.fromstring(score_map("Scores", table, {}))
    assert cells(root, "none") == [(0, 0)]
    assert "forbidden" in texts(root) and not cells(root, "frame")
