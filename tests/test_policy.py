import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitscape.policy import LayerBits, Policy, PolicyError, fingerprint, uniform_policy

SHAPES = {"conv1": (16, 3, 3, 3), "layer1.0.conv1": (16, 16, 3, 3), "fc": (10, 16)}

bits = st.builds(LayerBits, st.integers(1, 8), st.integers(1, 8))
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
policies = st.builds(
    Policy,
    layers=st.dictionaries(st.text(), bits, max_size=6),
    fingerprint=st.none() | st.text("0123456789abcdef", min_size=16, max_size=16),
    cost=st.dictionaries(st.text(), st.integers() | finite, max_size=4),
    provenance=st.dictionaries(st.text(), json_values, max_size=4),
)


def policy() -> Policy:
    return Policy(
        {"conv1": LayerBits(8, 8), "layer1.0.conv1": LayerBits(3, 4), "fc": LayerBits(8, 8)},
        fingerprint=fingerprint(SHAPES),
        cost={"bitops": 388_000_000, "mean_weight_bits": 2.97},
        provenance={"method": "fisher", "settings": {"images": 256}},
    )


def written(tmp_path, text: str):
    path = tmp_path / "policy.json"
    path.write_text(text, encoding="utf-8")
    return path


def edited(tmp_path, old: str, new: str):
    """The file of `policy()` with one piece of its text changed."""
    path = tmp_path / "policy.json"
    policy().save(path)
    text = path.read_text()
    assert old in text
    return written(tmp_path, text.replace(old, new))


@given(policies)
def test_a_saved_policy_loads_equal(tmp_path_factory, policy):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    policy.save(path)
    loaded = Policy.load(path)
    assert loaded == policy
    assert list(loaded.layers) == list(policy.layers)


def test_the_file_has_one_layer_a_line(tmp_path):
    path = tmp_path / "policy.json"
    policy().save(path)
    assert path.read_text().splitlines()[-6:] == [
        '  "layers": {',
        '    "conv1": {"weight": 8, "activation": 8},',
        '    "layer1.0.conv1": {"weight": 3, "activation": 4},',
        '    "fc": {"weight": 8, "activation": 8}',
        "  }",
        "}",
    ]
    document = json.loads(path.read_text())
    assert document["format"] == 1
    assert document["cost"]["bitops"] == 388_000_000


def test_a_file_by_hand_needs_only_format_and_layers(tmp_path):
    path = written(tmp_path, '\ufeff{"format": 1, "layers": {"fc": {"activation": 8, "weight": 2}}}')
    assert Policy.load(path) == Policy({"fc": LayerBits(2, 8)})


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "policy.json"
    policy().save(path)
    content = path.read_bytes().rstrip()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(PolicyError, match="complete"):
            Policy.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 2', "format 2 is unknown; this version reads format 1"),
        ('"format": 1,', "", 'must be an object with "format" and "layers"'),
        ('"layers"', '"layer"', "must be an object"),
        ('"provenance"', '"provenence"', "unknown entry 'provenence'; nearest: provenance"),
        ('"weight": 3', '"weight": 9', "layer 'layer1.0.conv1': weight bits are 9; allowed are whole numbers"),
        ('"weight": 3', '"weight": 0', "weight bits are 0"),
        ('"weight": 3', '"weight": 3.0', "weight bits are 3.0"),
        ('"weight": 3', '"weight": true', "weight bits are True"),
        ('"activation": 4', '"activation": null', "activation bits are None"),
        ('"weight": 3, ', "", "must read like"),
        ('{"weight": 3, "activation": 4}', "[3, 4]", "must read like"),
        ('"layer1.0.conv1"', '"conv1"', "'conv1' stands twice"),
        ('"weight": 3', '"weight": 8, "weight": 3', "'weight' stands twice"),
        ("388000000", "NaN", "NaN is no allowed number"),
        ("388000000", "1e999", "1e999 is no allowed number"),
        ("388000000", '"388M"', "cost 'bitops' is '388M'"),
        ("388000000", "true", "cost 'bitops' is True"),
        ('"images": 256', '"images": -Infinity', "-Infinity is no allowed number"),
        ('"images": 256', '"images": 1e999', "1e999 is no allowed number"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, old, new, message):
    path = edited(tmp_path, old, new)
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be an object"),
        ("", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"format": 1, "layers": [4]}', "'layers' is [4]; it must be an object"),
        ('{"format": 1, "layers": {}, "fingerprint": 7}', "fingerprint is 7"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    with pytest.raises(PolicyError) as caught:
        Policy.load(written(tmp_path, text))
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(b"\x80\x00\xff")
    with pytest.raises(PolicyError, match="not readable"):
        Policy.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", None, True])
def test_a_cost_must_be_a_finite_number(value):
    with pytest.raises(PolicyError, match="cost 'bitops'"):
        Policy({}, cost={"bitops": value})


def test_numbers_of_numpy_become_plain_ones():
    cost = Policy({}, cost={"bitops": np.int64(3), "mean_weight_bits": np.float32(2.5)}).cost
    assert cost == {"bitops": 3, "mean_weight_bits": 2.5}
    assert [type(value) for value in cost.values()] == [int, float]


@pytest.mark.parametrize("provenance", [{"model": object()}, {"loss": float("nan")}])
def test_provenance_must_be_plain_data(provenance):
    with pytest.raises(PolicyError, match="provenance"):
        Policy({}, provenance=provenance)


def test_layers_must_map_names_to_bits():
    with pytest.raises(PolicyError, match="layers must map names to LayerBits, got 'fc': 4"):
        Policy({"fc": 4})


def test_a_policy_keeps_its_own_copy():
    layers = {"fc": LayerBits(8, 8)}
    kept = Policy(layers)
    layers["conv1"] = LayerBits(2, 2)
    assert list(kept.layers) == ["fc"]
    assert copy.deepcopy(kept) == kept


@pytest.mark.parametrize("wrong", [0, 9, -1, 4.0, True, "4", None])
def test_bits_go_from_1_to_8(wrong):
    with pytest.raises(PolicyError, match="activation bits"):
        LayerBits(4, wrong)
    with pytest.raises(PolicyError, match="weight bits"):
        LayerBits(wrong, 4)


def test_bits_are_ordered_and_shown_weight_first():
    assert sorted([LayerBits(4, 2), LayerBits(2, 8)]) == [LayerBits(2, 8), LayerBits(4, 2)]
    assert str(LayerBits(4, 8)) == "4/8"


def test_check_accepts_the_network_it_was_made_for():
    policy().check(SHAPES)
    policy().check(dict(reversed(SHAPES.items())))


def test_check_names_unknown_layers_and_their_neighbours():
    shapes = {"conv1": (16, 3, 3, 3), "layer1.0.conv2": (16, 16, 3, 3), "fc": (10, 16)}
    with pytest.raises(PolicyError, match=r"no layer 'layer1.0.conv1'; nearest: layer1.0.conv2"):
        policy().check(shapes)


def test_check_names_missing_layers():
    shapes = SHAPES | {f"layer2.{i}": (16, 16, 3, 3) for i in range(7)}
    with pytest.raises(PolicyError, match=r"no bits for 'layer2.0', .*'layer2.4' and 2 more"):
        policy().check(shapes)


def test_check_compares_the_shapes():
    other = SHAPES | {"fc": (100, 16)}
    with pytest.raises(PolicyError, match=f"{fingerprint(SHAPES)}.*{fingerprint(other)}.*shapes"):
        policy().check(other)
    Policy(policy().layers).check(other)


def test_fingerprint_ignores_order_only():
    mark = fingerprint(SHAPES)
    assert len(mark) == 16
    assert int(mark, 16) >= 0
    assert fingerprint(dict(reversed(SHAPES.items()))) == mark
    assert fingerprint({**SHAPES, "fc": (16, 10)}) != mark
    assert fingerprint({("head" if name == "fc" else name): shape for name, shape in SHAPES.items()}) != mark


def test_difference_lists_what_changed():
    other = Policy({"conv1": LayerBits(8, 8), "layer1.0.conv1": LayerBits(2, 4), "head": LayerBits(8, 8)})
    assert policy().difference(other) == [
        ("layer1.0.conv1", LayerBits(3, 4), LayerBits(2, 4)),
        ("fc", LayerBits(8, 8), None),
        ("head", None, LayerBits(8, 8)),
    ]
    assert policy().difference(policy()) == []


def test_uniform_policy_keeps_the_pinned_layers():
    made = uniform_policy(SHAPES, LayerBits(4, 4), {"fc": LayerBits(8, 8)})
    assert made.layers == {"conv1": LayerBits(4, 4), "layer1.0.conv1": LayerBits(4, 4), "fc": LayerBits(8, 8)}
    with pytest.raises(PolicyError, match="pinned layer 'fcc' is not among the layers; nearest: fc"):
        uniform_policy(SHAPES, LayerBits(4, 4), {"fcc": LayerBits(8, 8)})


@pytest.mark.parametrize("value", [10**309, -(10**309), float("inf"), float("nan"), True])
def test_a_cost_that_no_float_holds_is_refused(value):
    with pytest.raises(PolicyError, match="cost 'bitops' is"):
        Policy({"a": LayerBits(4, 4)}, cost={"bitops": value})


def test_a_policy_prints_its_ends_and_its_costs() -> None:
    layers = {f"layer{at}": LayerBits(2, 8) for at in range(50)}
    shown = Policy(layers, cost={"bitops": 2e9, "mean_weight_bits": 2.0}, provenance={"method": "fisher"})
    lines = repr(shown).splitlines()
    assert lines[:2] == ["Policy: 50 layers, fisher", "layer    weight bits  activation bits"] and len(lines) == 11
    assert [line.split()[0] for line in lines[2:10]] == ["layer0", "layer1", "layer2", "layer3", "...", "layer47", "layer48", "layer49"]
    assert lines[-1] == "bitops 2 G, mean_weight_bits 2"
    assert repr(Policy({})) == "Policy: 0 layers"
    assert "&lt;script&gt;" in Policy({"<script>": LayerBits(2, 2)})._repr_html_()


@pytest.mark.parametrize(("bits", "top"), [(LayerBits(4, 8), 8.5), (LayerBits(4, 16), 16.5), (LayerBits.FLOAT, 32.5)])
def test_every_width_is_on_the_chart(bits: LayerBits, top: float) -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    assert Policy({"a": LayerBits(2, 2), "b": bits}).plot(axes).get_ylim() == (0, top)


def test_a_policy_is_drawn_layer_after_layer() -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    assert Policy({"a": LayerBits(2, 8), "b": LayerBits(4, 6)}).plot(axes) is axes
    weights, activations = axes.get_lines()
    assert (list(weights.get_ydata()), list(activations.get_ydata())) == ([2, 4], [8, 6])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"] and axes.get_ylabel() == "bits"
