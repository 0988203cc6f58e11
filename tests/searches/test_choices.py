"""The allocation problem as data: candidates of each group, uniform choices, and costs of what stays float."""

import numpy as np
import pytest

from bitscape.cost.budget import Budget
from bitscape.cost.targets import TARGETS
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.allocation import allocate, pareto_front
from bitscape.searches.choices import DEFAULT_CANDIDATES, Choices
from bitscape.searches.random_policy import Random
from bitscape.searches.uniform import Uniform
from tests.searches.small import layer, network, noise_scores, square

NETWORK = network(layer("stem"), layer("body"), layer("head", weights=640))


def test_a_head_under_caps_on_bytes_is_offered_every_weight_width_at_8_bit_activations():
    choices = Choices.of(NETWORK, "4bit", candidates=square(2, 4))
    assert choices.offered == square(2, 4)
    assert choices.candidates == (*square(2, 4), LayerBits(2, 8), LayerBits(4, 8))
    assert choices.free_layers == ("body", "head")
    np.testing.assert_array_equal(choices.allowed, [[True] * 4 + [False] * 2, [False] * 4 + [True] * 2])
    policy = allocate(noise_scores(NETWORK, choices.candidates, 0), choices)
    assert policy.layers["head"].activation == 8 and policy.layers["body"] in square(2, 4)
    assert policy.cost["weight_bytes"] <= choices.budget.caps["weight_bytes"]


def test_uniform_bits_keep_the_activations_of_a_head():
    choices = Choices.of(NETWORK, "4bit", candidates=square(2, 3, 4))
    assert choices.policy(choices.uniform(0), {}).layers == {"stem": LayerBits(8, 8), "body": LayerBits(2, 2), "head": LayerBits(2, 8)}
    assert choices.widest() == {"body": LayerBits(4, 4), "head": LayerBits(4, 8)}
    result = Uniform().choose(choices, {})
    assert result.policy.layers == {"stem": LayerBits(4, 8), "body": LayerBits(4, 4), "head": LayerBits(4, 8)}


@pytest.mark.parametrize("seed", range(5))
def test_random_bits_do_too(seed):
    choices = Choices.of(NETWORK, "weight_bytes=0.5x", candidates=square(2, 3, 4, 8))
    assert Random(window=0.2).choose(choices, seed, {}).policy.layers["head"].activation == 8


def test_all_pairs_of_widths_leave_out_what_no_layer_may_have():
    pairs = (LayerBits(2, 2), LayerBits(4, 4))
    wide = Choices.of(NETWORK, "4bit", candidates=pairs).in_all_pairs(tuple(LayerBits(w, a) for w in (2, 4) for a in (2, 4, 8)))
    np.testing.assert_array_equal(wide.allowed, [[True, True, False] * 2, [False, False, True] * 2])


def test_a_layer_that_stays_float_costs_four_bytes_a_weight_and_no_scales():
    choices = Choices.of(NETWORK, Budget({"bitops": 1e9}), candidates=square(4), keep_float=["body"])
    policy = choices.policy(choices.uniform(0), {})
    assert policy.layers["body"] == LayerBits.FLOAT and choices.free_layers == ()
    assert policy.cost["weight_bytes"] == (64 + 16) + 4 * 64 + (640 + 16)
    assert policy.cost["bitops"] == 1000 * (64 + 32 * 32 + 64)
    assert policy.cost["mean_weight_bits"] == (64 * 8 + 64 * 32 + 640 * 8) / 768


def test_the_default_offers_what_the_target_has_and_16_bits_only_when_asked():
    assert Choices.of(NETWORK, "4bit").offered == DEFAULT_CANDIDATES
    openvino = Choices.of(NETWORK, "4bit", target=TARGETS["openvino"])
    assert [str(bits) for bits in openvino.candidates] == ["2/8", "3/8", "4/8", "6/8", "8/8"]
    wide = (LayerBits(8, 8), LayerBits(8, 16))
    assert Choices.of(NETWORK, "weight_bytes=1x", candidates=wide, target=TARGETS["htp"], pinned={}).offered == wide
    with pytest.raises(BitscapeError, match=r"candidates: 8/16 weight/activation bits are not what target openvino"):
        Choices.of(NETWORK, "4bit", candidates=wide, target=TARGETS["openvino"])


def test_float_is_no_candidate():
    with pytest.raises(BitscapeError, match=r"candidates: float is not searched; .* keep_float"):
        Choices.of(NETWORK, "4bit", candidates=[LayerBits.FLOAT])


def test_a_front_keeps_the_caps_on_other_costs():
    capped = Choices.of(NETWORK, "mean_activation_bits=7", candidates=square(2, 4, 8))
    scores = noise_scores(NETWORK, capped.candidates, 1)
    front = pareto_front(scores, capped, "weight_bytes", points=6).policies
    assert len(front) > 1 and all(policy.cost["mean_activation_bits"] <= 7 for policy in front)
    uncapped = Choices.of(NETWORK, Budget(), candidates=square(2, 4, 8), along="bitops")
    free = pareto_front(scores, uncapped, "weight_bytes", points=6).policies
    assert any(policy.cost["mean_activation_bits"] > 7 for policy in free)


def test_provenance_says_what_was_pinned():
    about = Choices.of(NETWORK, "4bit", target=TARGETS["openvino"]).provenance()
    assert about["pinned"] == {"stem": "8/8", "head": "*/8"} and about["target"] == "openvino"
