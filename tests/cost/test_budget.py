import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitscape.cost.budget import Budget, budget_kinds, parse_budget, split_drop
from bitscape.cost.layers import measure
from bitscape.cost.policy_cost import CAPS, bitops, cost, policy_cost
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, uniform_policy
from bitscape.searches.choices import Choices

COUNTED = [kind for kind, row in CAPS.items() if not row.measured]
NETWORK = measure(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 10)), (3, 6, 6))
PINNED = dict.fromkeys(NETWORK.ends, LayerBits(8, 8))


def uniform(weight: int, activation: int, pinned=PINNED):
    return uniform_policy(NETWORK.by_name, LayerBits(weight, activation), pinned)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("bitops=3.9e8", "bitops", 3.9e8),
        ("bitops = 34.7G", "bitops", 34.7e9),
        ("bitops=390M", "bitops", 390e6),
        ("bitops=12k", "bitops", 12e3),
        ("bitops=1.5e+6", "bitops", 1.5e6),
        ("weight_bytes=1.2MB", "weight_bytes", 1.2e6),
        ("weight_bytes=65536", "weight_bytes", 65536),
        ("weight_bytes=64 KiB", "weight_bytes", 65536),
        ("weight_bytes=100B", "weight_bytes", 100),
        ("peak_activation_bytes=64kB", "peak_activation_bytes", 64e3),
        ("peak_activation_bytes=.5MiB", "peak_activation_bytes", 2**19),
        ("mean_weight_bits=4", "mean_weight_bits", 4),
        ("mean_activation_bits=3.5", "mean_activation_bits", 3.5),
    ],
)
def test_absolute_forms(text, kind, value):
    assert parse_budget(text, NETWORK).caps == {kind: pytest.approx(value, rel=1e-15)}


@given(st.floats(0.01, 2).map(lambda fraction: round(fraction, 6)), st.sampled_from(COUNTED))
def test_fractions_are_of_the_eight_bit_cost(fraction, kind):
    eight_bits = policy_cost(NETWORK, uniform(8, 8))[kind]
    assert parse_budget(f"{kind}={fraction}x", NETWORK, PINNED).caps[kind] == pytest.approx(fraction * eight_bits)


@pytest.mark.parametrize("text", ["4bit", " 4Bit ", "4 bits", "weight_bytes=4bit", {"weight_bytes": "4bit"}, ["4bit"]])
def test_bits_of_every_layer_count_pinned_layers_too(text):
    packed, scales = (432 + 2304 + 640) * 4 // 8, 4 * (16 + 16 + 10)
    assert parse_budget(text, NETWORK, PINNED).caps == {"weight_bytes": packed + scales}


def test_bits_of_every_layer_stand_beside_other_caps():
    caps = parse_budget("3bit, bitops=w4a4", NETWORK, PINNED).caps
    assert caps == {"weight_bytes": cost("weight_bytes", NETWORK, uniform(3, 8, {})), "bitops": bitops(NETWORK, uniform(4, 4))}


def test_fraction_does_not_depend_on_pinned_bits():
    low = dict.fromkeys(NETWORK.ends, LayerBits(2, 2))
    assert parse_budget("bitops=1x", NETWORK, low).caps["bitops"] == bitops(NETWORK, uniform(8, 8))


@given(st.integers(1, 8), st.integers(1, 8))
def test_uniform_forms_are_the_cost_of_that_policy(weight, activation):
    policy = uniform(weight, activation)
    texts = {
        "bitops": f"w{weight}a{activation}",
        "weight_bytes": f"W{weight}",
        "mean_weight_bits": f"w{weight}",
        "mean_activation_bits": f"a{activation}",
        "peak_activation_bytes": f"w{weight}a{activation}",
    }
    budget = parse_budget(texts, NETWORK, PINNED)
    assert budget.caps == policy_cost(NETWORK, policy)
    assert budget.exceeded(NETWORK, policy) == {}


@given(st.floats(1e-3, 1e15))
def test_numbers_mean_themselves(value):
    assert parse_budget({"bitops": value}, NETWORK).caps == {"bitops": value}
    assert parse_budget(f"bitops={value!r}", NETWORK).caps == {"bitops": value}


def test_several_caps_from_every_form_of_input():
    expected = {"bitops": bitops(NETWORK, uniform(4, 4)), "weight_bytes": 2000.0}
    assert parse_budget("bitops=w4a4,weight_bytes=2kB", NETWORK, PINNED).caps == expected
    assert parse_budget(["bitops=w4a4", "weight_bytes=2kB"], NETWORK, PINNED).caps == expected
    assert parse_budget(("bitops=w4a4, weight_bytes=2000",), NETWORK, PINNED).caps == expected
    assert parse_budget({"bitops": "w4a4", "weight_bytes": 2000}, NETWORK, PINNED).caps == expected


def test_texts_of_a_generator_are_read_once():
    texts = ["weight_bytes=2000", "bitops=w4a4", "drop=0.5"]
    assert split_drop(text for text in texts) == (0.5, {"weight_bytes": "2000", "bitops": "w4a4"})
    expected = parse_budget(texts[:2], NETWORK, PINNED)
    assert parse_budget((text for text in texts[:2]), NETWORK, PINNED) == expected
    assert budget_kinds(iter(texts[:2]), has_latency=False) == ["weight_bytes", "bitops"]
    assert Choices.of(NETWORK, iter(texts[:2])).budget == Choices.of(NETWORK, texts[:2]).budget
    with pytest.raises(BitscapeError, match=r"budget gives drop twice"):
        split_drop(iter(["drop=1", "drop=2"]))
    with pytest.raises(BitscapeError, match=r"budget=\(\) holds no cap"):
        parse_budget(iter([]), NETWORK)


def test_pinned_layers_keep_their_bits():
    assert parse_budget("bitops=w2a2", NETWORK).caps["bitops"] == bitops(NETWORK, uniform(2, 2, pinned={}))
    assert parse_budget("bitops=w2a2", NETWORK, PINNED).caps["bitops"] == bitops(NETWORK, uniform(2, 2))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("bitop=0.5x", r"'bitop' is unknown.*nearest: bitops; examples: .*bitops=0.25x"),
        ({"latency": 3}, r"'latency' is unknown; kinds: bitops, weight_bytes"),
        ("0.5x", r"'0.5x' is not of the form kind=value; examples"),
        ("3.5bit", r"weight_bytes='3.5bit': bits must be a whole number from 1 to 8; write .* or 4bit, the bytes of"),
        ("9bit", r"weight_bytes='9bit': bits must be a whole number from 1 to 8"),
        ("0bit", r"weight_bytes='0bit': bits must be a whole number from 1 to 8"),
        ("bitops=4bit", r"bitops='4bit': that form counts bytes, weight_bytes=4bit"),
        ("4bit,weight_bytes=1MB", r"budget gives weight_bytes twice"),
        ("bitops", r"'bitops' is not of the form kind=value"),
        ("bitops=", r"bitops='' is not a positive amount; write bitops= .*0\.25x.*w4a4"),
        ("bitops=much", r"bitops='much'.*3\.9e8"),
        ("bitops=1.2MB", r"bitops='1.2MB' is not a positive amount"),
        ("bitops=-5", r"bitops='-5' is not a positive amount"),
        ("bitops=0", r"bitops='0'"),
        ("bitops=0x", r"bitops='0x'"),
        ("bitops=nan", r"bitops='nan'"),
        ("bitops=inf", r"bitops='inf'"),
        ("bitops=1e999", r"bitops='1e999'"),
        ({"bitops": math.nan}, r"bitops=nan"),
        ({"bitops": True}, r"bitops=True"),
        ({"bitops": None}, r"bitops=None"),
        ("weight_bytes=12parsecs", r"weight_bytes='12parsecs'.*1\.2MB.*\(w4\)"),
        ("mean_weight_bits=4k", r"mean_weight_bits='4k'.*4 or 3\.5"),
        ("bitops=w4", r"bitops='w4' does not say the activation bits"),
        ("weight_bytes=a4", r"weight_bytes='a4' does not say the weight bits"),
        ("peak_activation_bytes=w4", r"does not say the activation bits.*\(a4\)"),
        ("bitops=w9a4", r"'w9a4': bits must be from 1 to 8"),
        ("bitops=w0a4", r"'w0a4': bits must be from 1 to 8"),
        pytest.param(f"bitops=w{'9' * 5000}a4", r"is not a positive amount", id="more digits than int takes"),
        ("bitops=w4a", r"bitops='w4a' is not a positive amount"),
        ("bitops=1e6,bitops=2e6", r"gives bitops twice, the second time as '2e6'"),
        ("", r"budget='' holds no cap; examples"),
        ([], r"budget=\[\] holds no cap"),
        ({}, r"budget=\{\} holds no cap"),
    ],
)
def test_errors_name_kind_value_and_examples(texts, message):
    with pytest.raises(BitscapeError, match=message):
        parse_budget(texts, NETWORK)


def test_exceeded_names_only_the_caps_that_are():
    policy = uniform(4, 4)
    budget = Budget({"bitops": bitops(NETWORK, policy) - 1, "weight_bytes": 1e9})
    assert budget.exceeded(NETWORK, policy) == {"bitops": bitops(NETWORK, policy)}


def test_limits_are_whole_numbers_of_the_layer_costs():
    weights = sum(layer.weights for layer in NETWORK.layers)
    limits = parse_budget("bitops=1000.9,mean_weight_bits=4", NETWORK).limits(NETWORK)
    assert limits == {"bitops": 1000, "mean_weight_bits": 4 * weights}
    assert cost("mean_weight_bits", NETWORK, uniform(4, 4, pinned={})) == 4


def test_layers_that_are_never_called_are_stored_in_8_bits_in_relative_caps_as_in_policies():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.aside = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(1000, 100)

        def forward(self, x):
            return self.last(self.first(x).mean((2, 3)))

    network = measure(Auxiliary(), (3, 6, 6))
    policy = uniform_policy(["first", "last", "aside"], LayerBits(4, 8), {"aside": LayerBits(8, 8)})
    assert parse_budget("weight_bytes=w4", network).caps["weight_bytes"] == cost("weight_bytes", network, policy) > 100_000
    eight = uniform_policy(["first", "last", "aside"], LayerBits(8, 8))
    assert parse_budget("weight_bytes=0.5x", network).caps["weight_bytes"] == 0.5 * cost("weight_bytes", network, eight)
