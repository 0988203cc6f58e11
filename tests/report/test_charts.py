import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bitscape.report.charts import MOST_POINTS, curve_panel, interval_chart, time_chart
from bitscape.report.compare import comparisons, groups
from tests.report.reading import numbers, parts, texts
from tests.report.test_compare import MIXED, UNIFORM, made


def test_a_curve_goes_through_its_points_and_tells_its_last() -> None:
    root = ElementTree.fromstring(
        curve_panel("top-1", {"run": (3, [(1, 50.0), (2, 100.0), (3, 75.0)])})
    )
    (line,) = parts(root, "polyline", "s3 curve")
    (x1, y1), (x2, y2), (x3, y3) = (
        tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()
    )
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
    assert [float(each) for each in drawn[-1].split(",")] == numbers(dot, "cx", "cy")


def test_an_interval_ends_where_it_should(tmp_path: Path) -> None:
    # differences 1, 2, 3: from -0.4842 to 4.4842
    runs = made(
        tmp_path,
        [(UNIFORM, seed, 90.0) for seed in range(3)]
        + [(MIXED, seed, 91.0 + seed) for seed in range(3)],
    )
    root = ElementTree.fromstring(interval_chart(comparisons(groups(runs))))
    (bar,), (dot,) = parts(root, "rect", "s0 mark"), parts(root, "circle", "s0 mark")
    (x, width), (middle,) = numbers(bar, "x", "width"), numbers(dot, "cx")
    assert middle == pytest.approx(x + width / 2, abs=0.1)
    (zero,) = [numbers(each, "x1")[0] for each in parts(root, "line", "axis")]
    assert (zero - x) / width == pytest.approx(0.4842 / 4.9684, abs=1e-3)
    assert "fisher minus uniform 3/3" in texts(root)


def test_times_are_bars_from_zero() -> None:
    root = ElementTree.fromstring(
        time_chart([("float", 4.0), ("a/" * 50 + "net.onnx", 1.0)], "Milliseconds")
    )
    longer, shorter = (numbers(each, "width")[0] for each in parts(root, "rect", "s0 mark"))
    assert longer == pytest.approx(4 * shorter, abs=0.2)
    assert {"4 ms", "1 ms"} <= set(texts(root))
    assert max(map(len, texts(root))) <= 56
