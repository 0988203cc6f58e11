import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest

from bitscape.data.corruptions import CORRUPTIONS
from bitscape.engine.quality_table import Cell, QualityTable
from bitscape.errors import BitscapeError
from bitscape.report.heat_map import BLUES, GAP, HIGH, REDS, WIDE, heat_map, panel

Element = ElementTree.Element
NAMESPACE = "{http://www.w3.org/2000/svg}"


def made(corruptions: Sequence[str] = tuple(CORRUPTIONS), severities: Sequence[int] = range(1, 6), bits: bool = False) -> QualityTable:
    """Top-1 is 90 minus ten times the severity minus the number of the corruption; bits are 2 plus the severity."""
    pairs = [("clean", 0), *((name, severity) for name in corruptions for severity in severities)]
    return QualityTable(
        tuple(
            Cell(
                corruption=name,
                severity=severity,
                top1=90.0 - 10 * severity - (list(CORRUPTIONS).index(name) if severity else 0),
                loss=1.0,
                images=1234,
                bits=2.0 + severity if bits else None,
                bitops=1.0 if bits else None,
            )
            for name, severity in pairs
        )
    )


def panels(svg: str) -> list[Element]:
    groups = ElementTree.fromstring(svg).iter(NAMESPACE + "g")
    return [group for group in groups if group.get("class") == "panel"]


def drawn(values: Mapping[str, Sequence[float | None]], columns: Sequence[str] = ("1", "2"), **more: object) -> Element:
    options = {"x": 0, "y": 0, "title": "t", "axis": "a", "columns": columns, "ramp": BLUES, "digits": 1, **more}
    return ElementTree.fromstring(f'<svg xmlns="{NAMESPACE[1:-1]}">{panel(values, **options)}</svg>')


def cells(group: Element) -> list[tuple[Element, Element]]:
    """The squares, each with the text on it."""
    parts = list(group.iter())
    return [(one, other) for one, other in pairwise(parts) if one.get("class") == "cell"]


def rows(group: Element) -> dict[str, list[str]]:
    """Name left of a row -> the numbers in it, from left to right."""
    names = {text.get("y"): text.text or "" for text in group.iter(NAMESPACE + "text") if text.get("text-anchor") == "end"}
    found: dict[str, list[str]] = {}
    for _, text in cells(group):
        found.setdefault(names[text.get("y")], []).append(text.text or "")
    return found


def fill(element: Element) -> tuple[float, ...]:
    color = element.get("fill", "")
    return tuple(int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))


def luminance(color: tuple[float, ...]) -> float:
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in color]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_numbers_stand_in_their_rows_clean_first_then_trained_then_held_out() -> None:
    (only,) = panels(heat_map(made()))
    shown = rows(only)
    assert len(cells(only)) == 1 + 10 * 5
    assert list(shown) == [
        "clean",
        *("gaussian noise", "gaussian blur", "brightness", "contrast", "jpeg"),
        *("shot noise", "defocus blur", "pixelate"),
        *("impulse noise", "speckle noise"),
    ]
    assert shown.pop("clean") == ["90.0"]
    for number, name in enumerate(CORRUPTIONS):
        assert shown[name.replace("_", " ")] == [f"{80 - 10 * at - number}.0" for at in range(5)]


def test_each_group_is_named_above_its_first_row() -> None:
    (only,) = panels(heat_map(made(("pixelate", "impulse_noise", "jpeg", "contrast"))))
    texts = [text.text for text in only.iter(NAMESPACE + "text") if text.get("text-anchor") != "middle"]
    named = [text for text in texts if text in ("in the training mix", "held out", "others", *(rows(only)))]
    assert named == ["clean", "in the training mix", "jpeg", "contrast", "held out", "pixelate", "others", "impulse noise"]


def test_bits_get_a_panel_of_their_own() -> None:
    first, second = panels(heat_map(made(bits=True)))
    assert rows(first) == rows(panels(heat_map(made()))[0])
    shown = rows(second)
    assert shown.pop("clean") == ["2.00"]
    assert set(map(tuple, shown.values())) == {("3.00", "4.00", "5.00", "6.00", "7.00")}
    assert {fill(square) for square, _ in cells(first)}.isdisjoint(fill(square) for square, _ in cells(second))


def test_the_heading_tells_clean_and_mean() -> None:
    root = ElementTree.fromstring(heat_map(made(("gaussian_noise",), (1, 2))))
    assert root.get("aria-label") == "Top-1 90.00 % clean, 75.00 % in the mean of all corruptions"


@pytest.mark.parametrize("grid", [made(), made(bits=True), made(("jpeg",), (3,))])
def test_everything_lies_on_the_page_and_no_cell_on_another(grid: QualityTable) -> None:
    root = ElementTree.fromstring(heat_map(grid))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    corners = []
    for element in list(root.iter())[2:]:
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        right, bottom = (start + float(element.get(size, 0)) for start, size in ((x, "width"), (y, "height")))
        assert x >= 0 and y >= 0 and right <= width and bottom <= height
        if element.get("class") == "cell":
            assert not any(x < r and right > left and y < b and bottom > top for left, top, r, b in corners)
            corners.append((x, y, right, bottom))


@pytest.mark.parametrize("ramp", [BLUES, REDS])
def test_a_higher_value_is_darker_and_its_number_readable(ramp: object) -> None:
    values = [at / 100 for at in range(101)]
    squares = cells(drawn({"row": values}, columns=[str(value) for value in values], ramp=ramp))
    light = [luminance(fill(square)) for square, _ in squares]
    assert all(one > other for one, other in pairwise(light))
    for square, text in squares:
        one, other = sorted((luminance(fill(square)), luminance(fill(text))))
        assert (other + 0.05) / (one + 0.05) >= 4.5
    # CIE lightness falls from near white to near black without a leap: no tenth of the scale is more than a fifth of the fall.
    lightness = [116 * y ** (1 / 3) - 16 for y in light[::10]]
    assert lightness[0] > 95 and lightness[-1] < 22
    assert max(one - other for one, other in pairwise(lightness)) < (lightness[0] - lightness[-1]) / 5


def test_colors_run_from_the_lowest_to_the_highest_value() -> None:
    group = drawn({"up": [-2.0, 0.0], "high": [2.0, 0.0]})
    colors = ["#" + "".join(f"{value:02x}" for value in color) for color in BLUES]
    assert [square.get("fill") for square, _ in cells(group)] == [colors[0], colors[1], colors[2], colors[1]]
    scale = [rect.get("fill") for rect in group.iter(NAMESPACE + "rect") if rect.get("class") != "cell"]
    assert (scale[0], scale[-1]) == (colors[0], colors[2])
    assert [text.text for text in group.iter(NAMESPACE + "text")][-3:] == ["-2.0", "0.0", "2.0"]


def test_equal_values_have_the_middle_color() -> None:
    assert {fill(square) for square, _ in cells(drawn({"row": [5.0, 5.0]}))} == {tuple(value / 255 for value in BLUES[1])}


def test_a_single_value_is_as_wide_as_all_columns_and_a_group_moves_its_row_down() -> None:
    squares = [square for square, _ in cells(drawn({"one": [1.0], "two": [1.0, 2.0], "three": [3.0, 4.0]}, groups={"three": "g"}))]
    assert [float(square.get("width", 0)) for square in squares] == [2 * WIDE - 1, *[WIDE - 1] * 4]
    tops = [float(square.get("y", 0)) for square in squares]
    assert tops == [tops[0], *[tops[0] + HIGH] * 2, *[tops[0] + 2 * HIGH + GAP] * 2]


def test_a_missing_value_is_gray_and_does_not_set_the_scale() -> None:
    (missing, words), (square, _) = cells(drawn({"row": [None, 7.0]}))
    red, green, blue = fill(missing)
    assert words.text == "-" and red == green == blue
    assert fill(square) == tuple(value / 255 for value in BLUES[1])


def test_names_are_escaped() -> None:
    assert rows(drawn({"a < b & c": [1.0, 2.0]})) == {"a < b & c": ["1.0", "2.0"]}


def test_errors_name_the_rows() -> None:
    with pytest.raises(BitscapeError, match="row 'short' has 2 values; allowed are 3"):
        drawn({"full": [1.0, 2.0, 3.0], "short": [1.0, 2.0]}, columns="123")
    for empty in ({}, {"row": [None, None]}, {"row": [1.0, float("nan")]}):
        with pytest.raises(BitscapeError, match=r"values: rows \[.*give finite numbers or None"):
            drawn(empty)
