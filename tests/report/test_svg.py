import math
import xml.etree.ElementTree as ElementTree

import pytest

from bitscape.report.svg import NAMESPACE, Scale, dot, line, padded, path, picture, rect, text


def test_a_picture_says_what_it_shows_and_escapes_every_word() -> None:
    words = "<script>alert('&\"')</script>"
    body = [text(1, 2, words, "small", anchor="end", turn=-90), rect(0, 0, 1, 1, "a", words), path([(0, 0), (1, 2.25)], "b", words)]
    root = ElementTree.fromstring(picture(words, words, 20, 10, [*body, dot(1, 1, 2, "c", words), line(0, 0, 1, 1, "d")]))
    assert (root.tag, root.get("role"), root.get("viewBox")) == (f"{{{NAMESPACE}}}svg", "img", "0 0 20 10")
    assert [each.text for each in root][:2] == [words, words]
    assert [each.text for each in root.iter(f"{{{NAMESPACE}}}title")] == [words] * 4
    (written,) = root.iter(f"{{{NAMESPACE}}}text")
    assert (written.text, written.get("transform")) == (words, "rotate(-90 1 2)")
    assert [each.get("points") for each in root.iter(f"{{{NAMESPACE}}}polyline")] == ["0,0 1,2.2"]
    assert not list(root.iter(f"{{{NAMESPACE}}}script"))


@pytest.mark.parametrize(
    ("scale", "value", "pixel"),
    [
        (Scale(low=0, high=10, start=100, end=0), 2.5, 75),
        (Scale(low=1, high=100, start=0, end=50, log=True), 10, 25),
        (Scale(low=3, high=3, start=0, end=50), 3, 25),
    ],
)
def test_values_have_their_pixels(scale: Scale, value: float, pixel: float) -> None:
    assert scale(value) == pytest.approx(pixel)


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 8, False, [0, 2, 4, 6, 8]),
        (-0.89, 0.7, False, [-0.5, 0, 0.5]),
        (97.2, 99.9, False, [98, 99]),
        (5, 5, False, [5]),
        (2e-5, 0.04, True, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
        (2.4e6, 3.1e7, True, [5e6, 1e7, 2e7]),
        (2.0, 2.9, True, [2.0, 2.2, 2.4, 2.6, 2.8]),
    ],
)
def test_ticks_are_round_and_between_the_ends(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert Scale(low=low, high=high, start=0, end=1, log=log).ticks() == pytest.approx(ticks)


def test_axes_go_a_little_beyond_the_values() -> None:
    assert padded([0.0, 100.0], share=0.1) == (-10, 110)
    assert padded([1.0, 1e10], log=True, share=0.1) == pytest.approx((0.1, 1e11))
    low, high = padded([5.0])
    assert low < 5 < high
    low, high = padded([5.0], log=True)
    assert low < 5 < high


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_of_extreme_values_has_ends_and_ticks(log: bool) -> None:
    low, high = padded([1e-300, 1e300, *([] if log else [-1e308])], log=log)
    axis = Scale(low=low, high=high, start=0, end=100, log=log)
    assert all(math.isfinite(tick) for tick in axis.ticks())
    assert math.isfinite(axis(1e300))
