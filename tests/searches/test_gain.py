"""The most that mixed bits can win, against closed forms."""

import math

import numpy as np
import pytest

from bitscape.cost.budget import Budget
from bitscape.policy import LayerBits
from bitscape.searches.choices import Choices
from bitscape.searches.gain import Gain, gain_of, spread_gain
from bitscape.searches.scores import ScoreTable
from tests.searches.small import layer, network, square


def test_it_is_half_the_logarithm_of_the_arithmetic_over_the_geometric_mean():
    s, c = np.array([1.0, 4.0, 16.0]), np.array([2.0, 1.0, 1.0])
    arithmetic = (s.sum()) / c.sum()
    geometric = math.exp(float((c * np.log(s / c)).sum() / c.sum()))
    assert spread_gain(s, c, mean=5.0, least=0.0, most=16.0) == pytest.approx(math.log2(arithmetic / geometric) / 2, abs=1e-6)


def test_equal_layers_win_nothing_and_two_that_differ_by_two_bits_win_what_the_closed_form_says():
    assert spread_gain(np.ones(5), np.ones(5), 4.0, 1.0, 8.0) == pytest.approx(0.0, abs=1e-9)
    expected = math.log2((1 + 256) / 2 / 16) / 2
    assert spread_gain(np.array([1.0, 256.0]), np.ones(2), 4.0, 1.0, 8.0) == pytest.approx(expected, abs=1e-6)


def test_widths_end_where_the_candidates_do():
    far = spread_gain(np.array([1.0, 4.0**10]), np.ones(2), 4.0, 2.0, 8.0)
    assert far == pytest.approx(math.log2((1 + 4.0**10) * 4.0**-4 / (4.0**-2 + 4.0**10 * 4.0**-6)) / 2, abs=1e-6)
    assert spread_gain(np.array([0.0, 1.0]), np.ones(2), 4.0, 2.0, 8.0) == pytest.approx(2.0, abs=1e-6)  # 2 and 6 bits
    assert spread_gain(np.array([1.0, 9.0]), np.ones(2), 8.0, 2.0, 8.0) == 0.0  # the budget takes the widest everywhere


def table(choices: Choices, weight, activation, method="fisher") -> ScoreTable:
    rows = [[w * 4.0**-b.weight + a * 4.0**-b.activation for b in choices.candidates] for w, a in zip(weight, activation, strict=True)]
    return ScoreTable(choices.free_layers, choices.candidates, rows, method)


NETWORK = network(*(layer(name, weights=640) for name in ("stem", "one", "two", "head")))
PINNED = {"stem": LayerBits(8, 8), "head": LayerBits(8, 8)}


@pytest.mark.parametrize(
    ("budget", "weights", "activations"),
    [("mean_weight_bits=6", True, False), ("bitops=w4a4", True, True), ("mean_activation_bits=6", False, True)],
)
def test_scores_give_it_for_the_widths_that_a_cap_depends_on(budget, weights, activations):
    choices = Choices.of(NETWORK, budget, candidates=square(2, 3, 4, 5, 6, 8), pinned=PINNED)
    gain = gain_of(table(choices, (1.0, 16.0), (1.0, 64.0)), choices)
    assert gain.weights == (pytest.approx(math.log2(17 / 2 / 4) / 2, abs=0.01) if weights else None)
    assert gain.activations == (pytest.approx(math.log2(65 / 2 / 8) / 2, abs=0.01) if activations else None)
    assert gain.bits == max(side for side in (gain.weights, gain.activations) if side is not None)


def test_it_is_told_in_words():
    assert str(Gain(0.31, 0.31, None)) == "mixed bits can win at most 0.3 bits here: uniform bits are enough"
    assert str(Gain(1.97, 1.97, None)).startswith("mixed bits can win at most 2.0 bits here: uniform bits would need")


def test_scores_that_are_no_losses_and_other_caps_do_not_tell_it():
    choices = Choices.of(NETWORK, "bitops=w4a4", candidates=square(2, 4, 8), pinned=PINNED)
    assert gain_of(table(choices, (1.0, 2.0), (1.0, 2.0), method="local"), choices) is None
    peak = Choices.of(NETWORK, Budget({"peak_activation_bytes": 150}), candidates=square(2, 4, 8), pinned=PINNED)
    assert gain_of(table(peak, (1.0, 2.0), (1.0, 2.0)), peak) is None
