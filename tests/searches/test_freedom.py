"""What is pinned: by default as the budget asks for it, by name, by pattern, and what stays float."""

import pytest

from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.freedom import Pins, free_layers
from tests.searches.small import layer, network

EIGHT, FLOAT = LayerBits.EIGHT, LayerBits.FLOAT
NETWORK = network(*(layer(name) for name in ("stem", "body.0", "body.1", "head.box", "head.class")))
HEADS = NETWORK.__class__(**{**vars(NETWORK), "heads": ("head.box", "head.class")})


@pytest.mark.parametrize(
    "kinds", [["bitops"], ["weight_bytes", "bitops"], ["mean_activation_bits"], ["latency_ms"], ["peak_activation_bytes"]]
)
def test_caps_on_activations_pin_the_first_layer_and_every_head(kinds):
    freedom = free_layers(HEADS, kinds)
    assert freedom.pinned == {"stem": EIGHT, "head.box": EIGHT, "head.class": EIGHT}
    assert freedom.groups == (("body.0",), ("body.1",)) and freedom.activations == {}


@pytest.mark.parametrize("kinds", [["weight_bytes"], ["mean_weight_bits", "weight_bytes"], ["weight_bytes", "mean_activation_bits"]])
def test_a_cap_on_weights_alone_frees_the_weights_of_the_heads(kinds):
    freedom = free_layers(HEADS, kinds)
    assert freedom.pinned == {"stem": EIGHT}
    assert freedom.groups == (("body.0",), ("body.1",), ("head.box",), ("head.class",))
    assert freedom.activations == {"head.box": 8, "head.class": 8}
    assert freedom.described() == {"stem": "8/8", "head.box": "*/8", "head.class": "*/8"}


def test_without_heads_the_last_layer_is_one():
    assert free_layers(NETWORK, ["bitops"]).pinned == {"stem": EIGHT, "head.class": EIGHT}
    assert free_layers(network(layer("only")), ["weight_bytes"]).pinned == {"only": EIGHT}


def test_a_layer_tied_to_a_head_keeps_its_activations_too():
    freedom = free_layers(HEADS, ["weight_bytes"], tied=[("body.1", "head.box")])
    assert freedom.activations == {"body.1": 8, "head.box": 8, "head.class": 8}


def test_exact_names_go_before_patterns_and_the_first_pattern_counts():
    pinned = {"head.*": "4/8", "*": "2/2", "head.box": LayerBits(6, 6)}
    bits = free_layers(HEADS, ["bitops"], pinned=pinned).pinned
    heads = {"head.class": LayerBits(4, 8), "head.box": LayerBits(6, 6)}
    assert bits == {**dict.fromkeys(["stem", "body.0", "body.1"], LayerBits(2, 2)), **heads}


def test_a_mapping_stands_for_itself_and_pins_add_to_the_default():
    assert free_layers(HEADS, ["bitops"], pinned={}).pinned == {}
    assert free_layers(HEADS, ["bitops"], pinned={"body*": "float"}).pinned == {"body.0": FLOAT, "body.1": FLOAT}
    added = free_layers(HEADS, ["bitops"], pinned=Pins({"body.0": "3/8", "head*": LayerBits(4, 8)})).pinned
    assert added == {"stem": EIGHT, "body.0": LayerBits(3, 8), "head.box": LayerBits(4, 8), "head.class": LayerBits(4, 8)}


def test_layers_that_stay_float_override_the_default():
    freedom = free_layers(HEADS, ["weight_bytes"], keep_float=["head*"])
    assert freedom.pinned == {"stem": EIGHT, "head.box": FLOAT, "head.class": FLOAT} and freedom.activations == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pinned": {"hed*": "8/8"}}, r"pinned: no layer that runs matches 'hed\*'; nearest: head"),
        ({"pinned": {"sten": "8/8"}}, "pinned: the network has no layer 'sten'; nearest: stem"),
        ({"pinned": {"stem": "8"}}, "pinned: 'stem': bits '8': write weight/activation bits"),
        ({"pinned": {"stem": "9/8"}}, "pinned: 'stem': weight bits are 9"),
        ({"pinned": {"stem": 8}}, "pinned: layer 'stem' has 8; write e.g. LayerBits"),
        ({"keep_float": ["hed*"]}, r"keep_float: no layer that runs matches 'hed\*'"),
        ({"keep_float": ["stem"], "pinned": {"stem": "8/8"}}, "keep_float: layer 'stem' is pinned at 8/8"),
        ({"keep_float": ["stem"], "pinned": {"body.0": "4/4"}, "tied": [("stem", "body.0")]}, "stem at float, body.0 at 4/4"),
    ],
)
def test_mistakes_name_what_is_wrong(arguments, message):
    with pytest.raises(BitscapeError, match=message):
        free_layers(HEADS, ["bitops"], **arguments)


@pytest.mark.parametrize("pinned", [["head.box"], "head.box"])
def test_pins_that_are_no_mapping_are_refused(pinned):
    with pytest.raises(BitscapeError, match=r"pinned: .* is no mapping; write e\.g\. "):
        free_layers(HEADS, ["bitops"], pinned=pinned)
