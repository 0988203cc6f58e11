import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bitscape.report.charts import MOST_POINTS, curve_panel, front_chart, interval_chart, time_chart
from bitscape.report.compare import comparisons, groups
from bitscape.report.front import ComparedFront, Point
from bitscape.report.svg import NAMESPACE
from tests.report.test_compare import MIXED, UNIFORM, made

Element = ElementTree.Element


def parts(root: Element, tag: str, css: str) -> list[Element]:
    return [each for each in root.iter(f"{{{NAMESPACE}}}{tag}") if each.get("class") == css]


def texts(root: Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{{{NAMESPACE}}}text")]


def place(element: Element, *names: str) -> list[float]:
    return [float(element.get(name, "")) for name in names]


def front(**changed: object) -> ComparedFront:
    about = {"kind": "bitops", "method": "fisher", "caps": {"bitops": 150.0}, "best": (Point("", 100, 10.0), Point("", 1000, 0.1))}
    random = tuple(Point("", 148, score) for score in (2.0, 4.0, 8.0))
    beside = {"uniform": (Point("4/4", 316.2278, 5.0),), "random": random, "chosen": Point("", 316.2278, 1.0)}
    return ComparedFront(**{**about, **beside, **changed})


def test_cost_and_score_have_log_scales_on_which_the_middle_is_the_geometric_mean() -> None:
    root = ElementTree.fromstring(front_chart(front()))
    (line,) = parts(root, "polyline", "s0 curve")
    (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in line.get("points", "").split())
    (ring,) = parts(root, "circle", "ring")
    assert place(ring, "cx", "cy") == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2], abs=0.2)
    (square,) = parts(root, "rect", "s1 mark")
    assert place(square, "x")[0] + 4 == pytest.approx((x1 + x2) / 2, abs=0.2)
    (span,) = parts(root, "rect", "s2 light")
    decade = (y2 - y1) / 2
    assert place(span, "height")[0] == pytest.approx(decade * 0.60206, abs=0.2)  # 2 to 8: a factor of 4
    assert {"4/4", "random", "chosen", "BitOps, log scale", "score (fisher), log scale"} <= set(texts(root))
    assert "3 random policies: median 4, from 2 to 8" in ElementTree.tostring(root, "unicode")


def test_scores_that_are_not_positive_have_a_linear_scale() -> None:
    root = ElementTree.fromstring(front_chart(front(best=(Point("", 100, 1.0), Point("", 1000, -1.0)), random=(), chosen=None)))
    assert "score (fisher)" in texts(root)
    assert not parts(root, "rect", "s2 light") and not parts(root, "circle", "ring")


def test_a_curve_goes_through_its_points_and_tells_its_last() -> None:
    root = ElementTree.fromstring(curve_panel("top-1", {"run": (3, [(1, 50.0), (2, 100.0), (3, 75.0)])}))
    (line,) = parts(root, "polyline", "s3 curve")
    (x1, y1), (x2, y2), (x3, y3) = (tuple(map(float, pair.split(","))) for pair in line.get("points", "").split())
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.15)
    assert y3 == pytest.approx((y1 + y2) / 2, abs=0.15) and y2 < y1
    assert [each for each in texts(root) if each in "123"] == ["1", "2", "3"]
    assert "run: 75 after epoch 3" in ElementTree.tostring(root, "unicode")


def test_one_epoch_is_a_dot() -> None:
    root = ElementTree.fromstring(curve_panel("loss", {"run": (0, [(1, 0.5)])}, log=True))
    assert len(parts(root, "circle", "s0 mark")) == 1


def test_long_curves_are_thinned_to_their_end() -> None:
    points = [(float(at), float(at)) for at in range(1, 1001)]
    root = ElementTree.fromstring(curve_panel("loss", {"run": (0, points)}))
    (line,) = parts(root, "polyline", "s0 curve")
    drawn = line.get("points", "").split()
    assert len(drawn) <= MOST_POINTS + 1
    (dot,) = parts(root, "circle", "s0 mark")
    assert [float(each) for each in drawn[-1].split(",")] == place(dot, "cx", "cy")


def test_an_interval_ends_where_it_should(tmp_path: Path) -> None:
    # differences 1, 2, 3: from -0.4842 to 4.4842
    runs = made(tmp_path, [(UNIFORM, seed, 90.0) for seed in range(3)] + [(MIXED, seed, 91.0 + seed) for seed in range(3)])
    root = ElementTree.fromstring(interval_chart(comparisons(groups(runs))))
    (bar,), (dot,) = parts(root, "rect", "s0 mark"), parts(root, "circle", "s0 mark")
    (x, width), (middle,) = place(bar, "x", "width"), place(dot, "cx")
    assert middle == pytest.approx(x + width / 2, abs=0.1)
    (zero,) = [place(each, "x1")[0] for each in parts(root, "line", "axis")]
    assert (zero - x) / width == pytest.approx(0.4842 / 4.9684, abs=1e-3)
    assert "fisher minus uniform 3/3" in texts(root)


def test_times_are_bars_from_zero() -> None:
    root = ElementTree.fromstring(time_chart([("float", 4.0), ("a/" * 50 + "net.onnx", 1.0)], "Milliseconds"))
    longer, shorter = (place(each, "width")[0] for each in parts(root, "rect", "s0 mark"))
    assert longer == pytest.approx(4 * shorter, abs=0.2)
    assert {"4 ms", "1 ms"} <= set(texts(root))
    assert max(map(len, texts(root))) <= 56
