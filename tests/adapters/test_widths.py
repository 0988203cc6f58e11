import logging

import pytest

from bitscape.adapters.widths import offered_bits
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy

OFFERED = [(4, 8), (8, 8), (4, 32), (32, 32)]


def given(text: str, rounding="up"):
    policy = Policy({"conv": LayerBits.parse(text)})
    return offered_bits(policy, {"conv": OFFERED}, rounding, "the tool")["conv"]


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ("4/8", (4, 8)),
        ("3/6", (4, 8)),
        ("5/8", (8, 8)),
        ("3/16", (4, 32)),
        ("5/16", (32, 32)),
        ("float", (32, 32)),
    ],
)
def test_rounding_up_takes_the_next_pair_with_neither_width_smaller(asked, taken):
    assert given(asked) == taken


def test_exact_rounding_takes_what_the_tool_has_and_nothing_else():
    assert given("8/8", "exact") == (8, 8)
    with pytest.raises(BitscapeError) as error:
        given("5/8", "exact")
    assert str(error.value) == (
        "layer 'conv': the tool has no 5/8 weight/activation bits for it, only 4/8, 8/8, 4/float, float; take the next "
        "wider ones, here 8/8, by rounding='up' (--rounding up), or offer these only in the search (candidates=, --candidates)"
    )


def test_a_pair_beyond_all_is_refused_even_when_rounding_up():
    policy = Policy({"conv": LayerBits.FLOAT})
    with pytest.raises(
        BitscapeError, match="no float weight/activation bits for it, only 8/8; offer these only"
    ):
        offered_bits(policy, {"conv": [(8, 8)]}, "up", "the tool")


def test_an_unknown_rounding_is_refused():
    with pytest.raises(BitscapeError, match="rounding='ceil': allowed are 'exact' and 'up'"):
        given("8/8", "ceil")


def test_what_was_rounded_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "bitscape.adapters"):
        given("8/8")
        assert not caplog.messages
        given("5/8")
    assert caplog.messages == ["the tool: 1 of 1 layers get wider bits: conv 5/8 -> 8/8"]
