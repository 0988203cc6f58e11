import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from bitscape.policy import LayerBits
from bitscape.report.layer_charts import (
    BAR_HEIGHT,
    CELL,
    LEFT,
    LEGEND_HEIGHT,
    LONGEST,
    NARROWEST,
    WIDTHS,
    Cells,
    bits_panels,
    cell_map,
    share_panels,
    top_bits,
)
from bitscape.report.svg import NAMESPACE
from tests.report.made import policy
from tests.report.reading import heights, numbers, parts, texts, tips


def test_bars_are_as_high_as_their_bits() -> None:
    root = ElementTree.fromstring(bits_panels("Bits", policy().layers, WIDTHS, 16))
    panels = [each for each in root.iter(f"{{{NAMESPACE}}}g") if each.get("data-panel")]
    for panel, widths in zip(panels, ([8, 2, 4, 8], [8, 4, 2, 8]), strict=True):
        bars = [each for each in panel if each.tag.endswith("rect")]
        assert heights(bars) == [BAR_HEIGHT * bits / 16 for bits in widths]
        unit, base = numbers(panel, "data-unit", "data-base")
        assert [base - numbers(bar, "y")[0] for bar in bars] == [unit * bits for bits in widths]
        assert texts(panel) == [str(bits) for bits in widths]
    assert [panel.get("data-panel") for panel in panels] == ["weights", "activations"]
    assert set(policy().layers) <= set(texts(root))


def test_layers_that_stay_float_do_not_raise_the_panel() -> None:
    assert top_bits([LayerBits(4, 4), LayerBits.FLOAT]) == 8
    assert top_bits([LayerBits(4, 16)]) == 16
    root = ElementTree.fromstring(bits_panels("Bits", {"a": LayerBits.FLOAT}, ["weight"], 8))
    assert heights(parts(root, "rect", "weights")) == [BAR_HEIGHT] and "32" in texts(root)


def test_the_marked_row_of_a_map_says_how_a_script_moves_it() -> None:
    cells = Cells(layers=["a"], rows=["1 MB", "2 MB"], shades=[["c0", "c11"]], marked=1)
    root = ElementTree.fromstring(cell_map("Map", "Bits.", cells, []))
    (row,) = (each for each in root.iter(f"{{{NAMESPACE}}}g") if each.get("data-first"))
    first, step = numbers(row, "data-first", "data-step")
    assert (first, step) == (LEGEND_HEIGHT - 0.5, CELL)
    assert numbers(row[0], "x", "y") == [LEFT - 0.5, first + step]


@pytest.mark.parametrize("count", [1, 20, 60, 200])
def test_columns_have_room_for_their_names_and_all_lies_in_the_picture(count: int) -> None:
    names = [f"features.{at}.conv.project.and.a.very.long.name" for at in range(count)]
    root = ElementTree.fromstring(
        bits_panels("Bits", dict.fromkeys(names, LayerBits(8, 8)), WIDTHS, 8)
    )
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    turned = [each for each in root.iter(f"{{{NAMESPACE}}}text") if each.get("transform")]
    places = [float(each.get("x", "")) for each in turned]
    assert len(places) == count
    assert all(
        later - earlier >= NARROWEST - 0.11 for earlier, later in pairwise(places)
    )  # places are rounded
    assert places[0] > LEFT and places[-1] < width
    assert all(len(each.text or "") <= LONGEST for each in turned)
    assert float(turned[0].get("y", "")) + 6 * LONGEST <= height
    for each in root.iter(f"{{{NAMESPACE}}}rect"):
        assert (
            float(each.get("x", "")) >= 0
            and float(each.get("x", "")) + float(each.get("width", "")) <= width
        )
        assert (
            float(each.get("y", "")) >= 0
            and float(each.get("y", "")) + float(each.get("height", "")) <= height
        )


def test_shares_are_drawn_to_the_largest() -> None:
    root = ElementTree.fromstring(
        share_panels(
            "Cost",
            {
                "BitOps": {"a": (75.0, "3 M"), "b": (25.0, "1 M")},
                "bytes": {"a": (0.5, "1 B"), "b": (99.5, "2 B")},
            },
        )
    )
    assert heights(parts(root, "rect", "work")) == pytest.approx(
        [BAR_HEIGHT, BAR_HEIGHT / 3], abs=0.1
    )
    assert "a: 75.00 % of BitOps, 3 M" in tips(root)
    assert "75" in texts(root) and "0" in texts(root)
    assert "b has the largest share of bytes, 99.5 %" in ElementTree.tostring(root, "unicode")
