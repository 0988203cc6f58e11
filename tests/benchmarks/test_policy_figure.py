import xml.etree.ElementTree as ElementTree

import pytest
from torch import nn

from benchmarks.policy_figure import BASE, BIT, BUDGET, COLORS, NETWORK, SHARE, kind, policy_figure
from bitscape.errors import BitscapeError

SVG = "{http://www.w3.org/2000/svg}"


def test_each_layer_has_its_bits_above_and_its_share_below():
    policy = {"features.0.0": [8, 8], "features.1.conv.0.0": [3, 8], "classifier.1": [4, 8]}
    run = {"network": NETWORK, "method": "fisher", "variant": BUDGET, "policy": policy}
    others = [{**run, "method": "uniform", "policy": {}}, {**run, "variant": "w6a6", "policy": {}}]
    drawn = ElementTree.fromstring(policy_figure([*others, run]))
    layers = [group for group in drawn.iter(f"{SVG}g") if group.get("class") == "layer"]
    bars = [[rect for rect in group.iter(f"{SVG}rect")] for group in layers]
    assert [float(above.get("height", "")) for above, _ in bars] == [8 * BIT, 3 * BIT, 4 * BIT]
    assert [float(above.get("y", "")) for above, _ in bars] == [BASE - bits * BIT for bits in (8, 3, 4)]
    assert [above.get("fill") for above, _ in bars] == [COLORS[name] for name in ("first layer", "depthwise", "classifier")]
    weights = (32 * 3 * 9, 32 * 9, 1000 * 1280)
    shares = [100 * number / sum(weights) for number in weights]
    assert [float(below.get("height", "")) for _, below in bars] == pytest.approx([max(share * SHARE, 0.5) for share in shares], abs=0.06)


def test_kinds_of_layers():
    assert kind(nn.Conv2d(4, 8, 1)) == "1×1"


def test_without_a_search_it_says_what_makes_one():
    with pytest.raises(BitscapeError, match=r"python -m benchmarks\.tasks"):
        policy_figure([])
