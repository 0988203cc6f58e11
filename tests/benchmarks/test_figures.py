import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest

from benchmarks.figures import BANDS, CONTROL, DOWN, HUNDRED, LEFT, MIXED, SIDE, TOP, ZERO, contours, equal_bytes
from bitscape.errors import BitscapeError
from bitscape.sharpness import LossSlice

Element = ElementTree.Element
LENGTH = math.log(100)


def slice_of(loss: Callable[[float, float], float], points: int = 5) -> LossSlice:
    offsets = tuple(2 * i / (points - 1) - 1 for i in range(points))
    return LossSlice(offsets=offsets, losses=tuple(tuple(loss(a, b) for b in offsets) for a in offsets))


def along_a(a: float, b: float) -> float:
    """From 0.1 at the left to 10 at the right."""
    return math.exp(LENGTH * a / 2)


def rising(center: float, a: float, b: float) -> float:
    return center + a


def drawn(slices: Mapping[str, LossSlice]) -> tuple[list[Element], Element]:
    """The panels, and the scale."""
    groups = list(ElementTree.fromstring(contours(slices)).iter("{http://www.w3.org/2000/svg}g"))
    (scale,) = (group for group in groups if group.get("class") == "scale")
    return [group for group in groups if group.get("class") == "panel"], scale


def of(group: Element, kind: str) -> list[Element]:
    return list(group.iter("{http://www.w3.org/2000/svg}" + kind))


def words(group: Element) -> list[str]:
    return [text.text or "" for text in of(group, "text")]


def corners(path: Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", path.get("d") or "")]


def fills(group: Element, kind: str) -> list[str | None]:
    return [each.get("fill") for each in of(group, kind)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_network_has_a_panel_with_title_center_and_axes(count: int) -> None:
    panels, _ = drawn({f"W{n} & <A{n}>": slice_of(partial(rising, 2.0 + n)) for n in range(count)})
    assert len(panels) == count
    for n, panel in enumerate(panels):
        assert words(panel)[:2] == [f"W{n} & <A{n}>", f"at the center {2 + n}"]
        assert words(panel)[2:] == ["-1", "-1", "0", "0", "1", "1", "a, along the first direction", "b, along the second direction"]
    places = [(float(rect.get("x", "")), float(rect.get("y", ""))) for panel in panels for rect in of(panel, "rect")]
    assert len({y for _, y in places}) == (2 if count == 4 else 1) and len(set(places)) == count


def test_contours_of_a_plane_are_parallel_and_evenly_spaced() -> None:
    (across,), _ = drawn({"n": slice_of(along_a)})
    for at, path in enumerate(of(across, "path"), start=1):
        assert min(x for x, _ in corners(path)) == pytest.approx(LEFT + SIDE * at / BANDS, abs=0.06)
        assert {y for _, y in corners(path)} == {TOP + SIDE * i / 4 for i in range(5)}
    (upwards,), _ = drawn({"n": slice_of(lambda a, b: along_a(b, a))})
    for at, path in enumerate(of(upwards, "path"), start=1):
        assert max(y for _, y in corners(path)) == pytest.approx(TOP + SIDE * (1 - at / BANDS), abs=0.06)
    assert len(of(across, "path")) == len(of(upwards, "path")) == BANDS - 1


def test_a_peak_is_cut_into_nested_diamonds() -> None:
    # One high point in the middle of 3 x 3: seen from there, the loss falls linearly in its logarithm along the four sides.
    (panel,), _ = drawn({"n": slice_of(lambda a, b: math.e if a == b == 0 else 1.0, points=3)})
    middle = LEFT + SIDE / 2
    for at, path in enumerate(of(panel, "path"), start=1):
        xs = [x for x, _ in corners(path)]
        reach = SIDE / 2 * (1 - at / BANDS)
        assert (min(xs), max(xs)) == pytest.approx((middle - reach, middle + reach), abs=0.06)


def test_panels_share_one_scale_with_values() -> None:
    panels, scale = drawn({"low": slice_of(lambda a, b: 0.1), "whole": slice_of(along_a), "high": slice_of(lambda a, b: 10.0)})
    colors = fills(scale, "rect")
    assert len(colors) == len(set(colors)) == BANDS
    assert words(scale) == ["loss", *(f"{0.1 * 100 ** (at / BANDS):.3g}" for at in range(BANDS + 1))]
    low, whole, high = panels
    assert fills(low, "path") == [] and fills(low, "rect") == [colors[0]]
    assert fills(whole, "path") == colors[1:]
    assert fills(high, "path")[-1] == colors[-1]
    heights = [float(rect.get("y", "")) for rect in of(scale, "rect")]
    assert heights == sorted(heights, reverse=True)  # the highest loss on top


def test_losses_without_a_logarithm_are_drawn_at_the_ends() -> None:
    def with_corner(value: float) -> LossSlice:
        return slice_of(lambda a, b: value if a == b == 1 else along_a(a, b))

    highest, lowest = contours({"n": slice_of(along_a)}), contours({"n": with_corner(0.1)})
    assert contours({"n": with_corner(math.inf)}) == contours({"n": with_corner(math.nan)}) == highest
    assert contours({"n": with_corner(0.0)}) == lowest != highest


def test_a_flat_landscape_is_one_color() -> None:
    (panel,), _ = drawn({"n": slice_of(lambda a, b: 0.5)})
    assert len(set(fills(panel, "path"))) == 1 and "at the center 0.5" in words(panel)


def test_the_figure_stands_on_its_own_and_fits_the_page() -> None:
    text = contours({f"n{n}": slice_of(along_a) for n in range(4)})
    page = ElementTree.fromstring(text)
    assert text.count("http") == 1 and "style" not in text  # the namespace; nothing is fetched
    ground = page.find("{http://www.w3.org/2000/svg}rect")
    assert ground is not None and ground.get("fill") == "#ffffff"  # its own: dark text stays readable on a dark page
    assert float(page.get("height", "0")) > TOP + DOWN + SIDE
    assert max(x for path in of(page, "path") for x, _ in corners(path)) < float(page.get("width", "0")) - 90


@pytest.mark.parametrize("slices", [{}, {"n": slice_of(lambda a, b: math.nan)}])
def test_nothing_to_draw_is_an_error(slices: dict[str, LossSlice]) -> None:
    with pytest.raises(BitscapeError, match="at least one slice"):
        contours(slices)


def of_network(method: str, top1: float, network: str = "net & co", bits: int = 8, **fields: Any) -> dict[str, Any]:
    known = {"test_images": 100, "settings": {"activation_bits": bits}, "extra": {"plain_top1": 10.0}, "proxy": None}
    return {"network": network, "method": method, "top1": top1, **known, **fields}


EQUAL = [
    of_network("float", 80.0, extra={}),
    of_network("random", 30.0, extra={}),
    of_network("fisher", 50.0),
    of_network("fisher", 45.0, proxy="cifar10:256"),
    of_network("fisher", 55.0, proxy="cifar10:256", variant="policy only"),
    of_network("fisher", 57.0, proxy="tiny_imagenet:256", variant="policy only"),
    of_network("fisher", 99.0, bits=6),
    of_network("random", 20.0, extra={}),
    of_network("uniform", 40.0, network="other"),
]


def rows_of(panel: Element) -> list[Element]:
    return [group for group in panel.iter("{http://www.w3.org/2000/svg}g") if group.get("class") == "row"]


def equal_panels() -> list[Element]:
    groups = ElementTree.fromstring(equal_bytes(EQUAL)).iter("{http://www.w3.org/2000/svg}g")
    return [group for group in groups if group.get("class") == "panel"]


def test_equal_bytes_has_a_panel_for_each_network_and_a_row_for_each_way_in_one_order() -> None:
    first, second = equal_panels()
    assert words(first)[0] == "net & co, 100 ImageNet images" and words(second)[0] == "other, 100 ImageNet images"
    found = [words(row) for row in rows_of(first)]
    assert found == [["mixed: fisher", "50.0"], ["mixed: fisher, searched on CIFAR-10 images", "55.0"], ["random bits, 2 draws"]]
    assert [words(row) for row in rows_of(second)] == [["uniform 4 bits", "40.0"]]


def test_equal_bytes_puts_ring_disc_bar_and_float_line_where_the_percentages_are() -> None:
    panel, _ = equal_panels()
    fisher, _, random = rows_of(panel)
    x = {percent: ZERO + (HUNDRED - ZERO) * percent / 100 for percent in (10, 20, 30, 45, 50, 55, 80)}
    assert [float(each.get("cx", "")) for each in of(fisher, "circle")] == [x[10], x[50]]
    assert [float(each.get("cx", "")) for each in of(random, "circle")] == [x[30], x[20]]  # nothing is known from before repair
    assert fills(fisher, "circle") == ["#ffffff", MIXED] and set(fills(random, "circle")) == {CONTROL}
    # 50 % of 100 images: one standard error is 5 points.
    bar = re.fullmatch(r"M([\d.]+),[\d.]+H([\d.]+)", of(fisher, "path")[1].get("d") or "")
    assert bar and (float(bar[1]), float(bar[2])) == pytest.approx((x[45], x[55]))
    (line,) = (path for path in of(panel, "path") if path.get("stroke-dasharray"))
    assert (line.get("d") or "").startswith(f"M{x[80]:g},")


def test_equal_bytes_without_runs_names_the_benchmark() -> None:
    with pytest.raises(BitscapeError, match=r"python -m benchmarks\.ptq_imagenet"):
        equal_bytes([of_network("fisher", 99.0, bits=6)])
