import math
import xml.etree.ElementTree as ElementTree

import pytest

from bitscape.report.layer_charts import BAR_HEIGHT
from bitscape.report.noise_charts import HEIGHT, LEFT, TOP, WIDTH, histogram, noise_panels
from bitscape.report.svg import NAMESPACE
from tests.report.made import LAYERS, analysis, noise
from tests.report.reading import heights, parts, texts, tips


def test_bars_are_as_high_as_errors_and_signal_to_noise() -> None:
    root = ElementTree.fromstring(noise_panels("Noise", analysis()))
    assert heights(parts(root, "rect", "work")) == pytest.approx(
        [BAR_HEIGHT / 8, BAR_HEIGHT / 4, BAR_HEIGHT / 2, BAR_HEIGHT]
    )
    assert heights(parts(root, "rect", "weights")) == pytest.approx(
        [BAR_HEIGHT * db / 30 for db in (30, 29, 28, 27)], abs=0.1
    )
    assert heights(parts(root, "rect", "activations")) == [0, 0, 0, 0]
    assert "last: 80 %" in tips(root) and "first: not known" in tips(root)
    assert set(LAYERS) <= set(texts(root))


def test_a_histogram_shows_counts_and_the_ends_of_the_grid() -> None:
    root = ElementTree.fromstring(histogram("weight of last", noise()))
    many, one = parts(root, "rect", "s0 mark")
    full = HEIGHT - 22 - TOP
    assert heights([many, one]) == pytest.approx([full, full * math.log(2) / math.log(4)], abs=0.1)
    ends = [
        float(each.get("x1", ""))
        for each in root.iter(f"{{{NAMESPACE}}}line")
        if each.get("class") == "edge"
    ]
    inner = WIDTH - 2 * LEFT
    assert ends == pytest.approx([LEFT + inner * 0.5 / 4, LEFT + inner * 3.5 / 4], abs=0.1)
    assert {"-1", "3", "weight of last"} <= set(texts(root))


def test_the_grid_may_reach_further_than_the_values() -> None:
    root = ElementTree.fromstring(histogram("weight", noise(clip_min=-4.0, clip_max=4.0)))
    assert {"-4", "4"} <= set(texts(root))
    assert float(parts(root, "rect", "s0 mark")[0].get("x", "")) == pytest.approx(
        LEFT + (WIDTH - 2 * LEFT) * 3 / 8, abs=0.1
    )
