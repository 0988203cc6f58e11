import xml.etree.ElementTree as ElementTree

import pytest

from bitscape.report.front import ComparedFront, Point
from bitscape.report.measured import Measurement, Measurements
from bitscape.report.policy_charts import LINE, Label, front_chart, measured_chart, written
from bitscape.report.svg import Scale
from tests.report.reading import numbers, parts, texts


def front(**changed: object) -> ComparedFront:
    about = {
        "kind": "bitops",
        "method": "fisher",
        "caps": {"bitops": 150.0},
        "best": (Point("", 100, 10.0), Point("", 1000, 0.1)),
    }
    random = tuple(Point("", 148, score) for score in (2.0, 4.0, 8.0))
    beside = {
        "uniform": (Point("4/4", 316.2278, 5.0),),
        "random": random,
        "chosen": Point("", 316.2278, 1.0),
    }
    return ComparedFront(**{**about, **beside, **changed})


def test_cost_and_score_have_log_scales_on_which_the_middle_is_the_geometric_mean() -> None:
    root = ElementTree.fromstring(front_chart(front()))
    (line,) = parts(root, "polyline", "s0 curve")
    (x1, y1), (x2, y2) = (
        tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()
    )
    (ring,) = parts(root, "circle", "ring")
    assert numbers(ring, "cx", "cy") == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2], abs=0.2)
    (square,) = parts(root, "rect", "s1 mark")
    assert numbers(square, "x")[0] + 4 == pytest.approx((x1 + x2) / 2, abs=0.2)
    (span,) = parts(root, "rect", "s2 light")
    decade = (y2 - y1) / 2
    assert numbers(span, "height")[0] == pytest.approx(
        decade * 0.60206, abs=0.2
    )  # 2 to 8: a factor of 4
    assert {"4/4", "random", "chosen", "BitOps, log scale", "score (fisher), log scale"} <= set(
        texts(root)
    )
    assert "3 random policies: median 4, from 2 to 8" in ElementTree.tostring(root, "unicode")


def test_scores_that_are_not_positive_have_a_linear_scale() -> None:
    root = ElementTree.fromstring(
        front_chart(
            front(best=(Point("", 100, 1.0), Point("", 1000, -1.0)), random=(), chosen=None)
        )
    )
    assert "score (fisher)" in texts(root)
    assert not parts(root, "rect", "s2 light") and not parts(root, "circle", "ring")


def of(role: str, kilobytes: float | None, value: float, half: float = 0.0) -> Measurement:
    interval = (value - half, value + half) if half else None
    size = None if kilobytes is None else 1000 * kilobytes
    name = {"uniform": "uniform 4/8", "chosen": "fisher"}.get(role, role)
    return Measurement(name=name, role=role, bytes=size, value=value, interval=interval)


def test_the_metric_is_drawn_over_the_size() -> None:
    every = [
        *(of("float", 800, 90.0), of("chosen", 120, 88.0, half=1.0)),
        *(of("uniform", 100, 86.0, half=1.0), of("random", 110, 84.0), of("random", 110, 80.0)),
    ]
    found = Measurements(metric="top-1 %", where="digits", all=tuple(every))
    root = ElementTree.fromstring(measured_chart(found))
    (ring,), (square,) = parts(root, "circle", "ring"), parts(root, "rect", "s1 mark")
    first, second = parts(root, "circle", "s2 mark")
    (dashed,) = parts(root, "line", "float")
    (x, y), (x1, y1), (_, y2) = (numbers(each, "cx", "cy") for each in (ring, first, second))
    assert numbers(square, "x")[0] + 4.5 == pytest.approx(2 * x1 - x, abs=0.2)  # 100, 110, 120 kB
    point = (y2 - y1) / 4
    assert y1 - y == pytest.approx(4 * point, abs=0.2)
    assert y - numbers(dashed, "y1")[0] == pytest.approx(2 * point, abs=0.2)
    (stroke,) = parts(root, "line", "whisker s0")
    low, high = numbers(stroke, "y1", "y2")
    assert (low - y, y - high) == pytest.approx((point, point), abs=0.2)
    shown = texts(root)
    assert {"fisher", "4/8", "float 90.00", "top-1 %", "weight bytes"} <= set(shown)
    assert shown.count("random") == 1


def test_labels_lie_on_no_mark_and_on_no_other_label() -> None:
    labels = [Label(100, 50, "one"), Label(104, 50, "two"), Label(100, 52, "three")]
    x = Scale(low=0, high=1, start=58, end=400)
    root = ElementTree.fromstring(f"<g>{''.join(written(labels, [(100, 50), (104, 50)], x))}</g>")
    shown = {each.text: (numbers(each, "x", "y"), each.get("text-anchor")) for each in root}
    assert shown["one"][1] is None and shown["two"][1] == "end"
    heights = sorted(y for (_, y), _ in shown.values())
    assert heights[2] - heights[0] >= LINE
    (edge,) = written([Label(398, 10, "beyond the end")], [], x)
    assert 'text-anchor="end"' in edge
