import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from bitscape.policy import LayerBits
from bitscape.report.layer_charts import CELL, LEFT, LEGEND_HEIGHT, WIDEST
from bitscape.report.score_maps import drawn_scores, parts, scale_ends, score_map, shade_of
from bitscape.report.svg import NAMESPACE
from bitscape.searches.scores import ScoreTable
from tests.report.made import policy, scores
from tests.report.reading import Element, texts

PAIRS = (LayerBits(2, 2), LayerBits(4, 4))


def test_weights_and_activations_have_maps_of_their_own() -> None:
    weights, activations = parts(scores())
    assert (weights.varied, weights.columns) == ("weight", [2, 1])  # 2/4, 4/4
    assert (activations.varied, activations.columns) == ("activation", [3, 1])  # 4/2, 4/4
    assert weights.title == "weight bits, with activations at 4 bits"


def test_pairs_that_differ_in_both_widths_stay_together() -> None:
    (both,) = parts(ScoreTable(("a",), PAIRS, [[1.0, 0.5]], "fisher"))
    assert (both.varied, list(both.columns)) == ("", [0, 1])
    (weights,) = parts(ScoreTable(("a",), (LayerBits(2, 8), LayerBits(4, 8)), [[1, 0]], "fisher"))
    assert weights.varied == "weight"


def test_shades_are_even_in_the_logarithm() -> None:
    values = (0.0, 1e-7, 1e-6, 1.1e-3, 0.9e-3, 1.0, math.inf)
    shades = [shade_of(value, 1e-6, 1.0) for value in values]
    assert shades == ["c0", "c0", "c0", "c6", "c5", "c11", "none"]
    assert shade_of(2.0, 2.0, 2.0) == "c0"


def test_the_scale_spans_six_decades_at_most() -> None:
    assert scale_ends([0.01, 2.0, 0.0, math.inf]) == (0.01, 2.0)
    assert scale_ends([10.0, 1e-9]) == (pytest.approx(1e-5), 10.0)
    assert scale_ends([0.0, 0.0]) == (1.0, 1.0)


def test_negative_scores_count_from_the_best_of_their_layer() -> None:
    values = np.array([[-1.0, -3.0], [5.0, 4.0]])
    negative = ScoreTable(("a", "b"), PAIRS, values, "differentiable")
    assert drawn_scores(negative) == [[2.0, 0.0], [1.0, 0.0]]
    assert drawn_scores(scores()) == scores().values.tolist()


def cells(root: Element, css: str) -> list[tuple[float, float]]:
    """Columns, in pixels, and rows of the cells of a class, from 0."""
    paths = [each for each in root.iter(f"{{{NAMESPACE}}}path") if each.get("class") == css]
    corners = [
        tuple(map(float, pair.split()))
        for each in paths
        for pair in re.findall(r"M([\d.]+ [\d.]+)h", each.get("d", ""))
    ]
    return [(x - LEFT, (y - LEGEND_HEIGHT) / CELL) for x, y in corners]


def test_each_score_has_its_cell_and_the_chosen_ones_a_frame() -> None:
    weights, activations = parts(scores())
    root = ElementTree.fromstring(score_map("Scores", scores(), weights, policy().layers))
    assert sum(len(cells(root, f"c{at}")) for at in range(12)) == 4
    assert cells(root, "c11") == [(WIDEST, 0)]  # 0.75 of third at 2 bits
    assert cells(root, "c0") == [(0, 1)]  # 0.01 of second at 4 bits
    assert cells(root, "frame") == [(0, 0), (WIDEST, 1)]  # weights: second 2, third 4
    assert {"2", "4"} <= set(texts(root))
    root = ElementTree.fromstring(score_map("Scores", scores(), activations, policy().layers))
    assert cells(root, "frame") == [(0, 1), (WIDEST, 0)]  # activations: second 4, third 2


def test_forbidden_pairs_look_otherwise() -> None:
    table = ScoreTable(("a",), PAIRS, np.array([[math.inf, 0.5]]), "fisher")
    root = ElementTree.fromstring(score_map("Scores", table, parts(table)[0], {}))
    assert cells(root, "none") == [(0, 0)]
    assert "forbidden" in texts(root) and not cells(root, "frame")
