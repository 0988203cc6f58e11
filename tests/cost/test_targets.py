from collections import OrderedDict
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitscape.cost.latency import LatencyTable
from bitscape.cost.layers import measure
from bitscape.cost.targets import TARGETS, Target, container_bytes
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy, uniform_policy

PROFILE = st.sampled_from(list(TARGETS.values()))
BITS = st.builds(LayerBits, st.integers(1, 8), st.integers(1, 8))
NAMES = [f"l{at}" for at in range(4)]


def test_what_each_target_stores_and_computes() -> None:
    widths = {name: (each.weight_bits, each.activation_bits, str(each.compute_bits(LayerBits(3, 4)))) for name, each in TARGETS.items()}
    every = tuple(range(1, 9))
    assert widths == {
        "cpu-int8": ((8,), (8,), "8/8"),
        "onnx-container": ((2, 4, 8), (8,), "8/8"),
        "openvino": ((2, 3, 4, 6, 8), (8,), "8/8"),
        "fpga-bitops": (every, (*every, 16), "3/4"),
        "cortex-m": ((4, 8), (8,), "8/8"),
        "ethos-u": ((2, 3, 4, 5, 6, 7, 8), (8,), "8/8"),
        "htp": ((4, 8), (8, 16), "8/8"),
    }
    assert all(each.name == name for name, each in TARGETS.items())


@given(PROFILE, st.integers(1, 8))
def test_weights_are_stored_in_the_smallest_width_that_holds_them(target: Target, weight: int) -> None:
    stored = target.stored_bits(weight)
    assert stored in target.weight_bits and stored >= weight
    assert not any(weight <= width < stored for width in target.weight_bits)


@given(PROFILE, BITS)
def test_only_the_targets_own_pairs_are_allowed(target: Target, bits: LayerBits) -> None:
    own = {LayerBits(w, a) for w, a in product(target.weight_bits, target.activation_bits)}
    assert target.allows(bits) == (bits in own)
    assert target.allows(LayerBits(8, 8))


def test_foreign_pairs_are_named() -> None:
    TARGETS["openvino"].check("candidates", [LayerBits(3, 8), LayerBits(8, 8)])
    with pytest.raises(BitscapeError, match=r"candidates: 5/8, 4/4 .*target openvino.*2, 3, 4, 6, 8 and activations of 8 bits"):
        TARGETS["openvino"].check("candidates", [LayerBits(5, 8), LayerBits(3, 8), LayerBits(4, 4)])


@pytest.mark.parametrize("widths", [(), (4,), (0, 8), (8, 9), (2.5, 8)])
def test_a_profile_has_widths_up_to_8(widths: tuple[int, ...]) -> None:
    with pytest.raises(BitscapeError, match=r"target 'own': weight_bits=.*; allowed are 1, 2, 3, 4, 5, 6, 7, 8, 8 among them"):
        Target(name="own", what="a target", weight_bits=widths)
    with pytest.raises(BitscapeError, match=r"activation_bits"):
        Target(name="own", what="a target", weight_bits=(8,), activation_bits=widths)


def test_htp_keeps_8_bits_where_int4_weights_do_not_pay() -> None:
    layers = {
        "pointwise": nn.Conv2d(8, 64, 1),
        "strided": nn.Conv2d(64, 64, 1, stride=2),
        "square": nn.Conv2d(64, 64, 3, padding=1),
        "grouped": nn.Conv2d(64, 64, 1, groups=2),
        "few": nn.Conv2d(64, 32, 1),
        "more": nn.Conv2d(32, 33, 1),
        "flat": nn.Flatten(),
        "hidden": nn.Linear(33 * 16, 40),
        "head": nn.Linear(40, 32),
    }
    network = measure(nn.Sequential(OrderedDict(layers)), (8, 8, 8))
    assert list(TARGETS["htp"].pins(network)) == ["strided", "square", "grouped", "few", "head"]
    assert set(TARGETS["htp"].pins(network).values()) == {LayerBits(8, 8)}
    assert all(not TARGETS[name].pins(network) for name in TARGETS if name != "htp")


def test_pinned_layers_must_be_at_bits_of_the_target() -> None:
    network = measure(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 1)), (3, 8, 8))
    TARGETS["htp"].check_pinned({"0": LayerBits(8, 8), "1": LayerBits(4, 8)}, network)
    with pytest.raises(BitscapeError, match=r"pinned: layer '1': 3/8 .*target htp"):
        TARGETS["htp"].check_pinned({"1": LayerBits(3, 8)}, network)
    with pytest.raises(BitscapeError, match=r"pinned: layer '0' at 4/8: target htp gives this layer 8 weight bits .*pin it at 8/8"):
        TARGETS["htp"].check_pinned({"0": LayerBits(4, 8)}, network)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"cpu-int8", "fpga-bitops"}))
def test_the_note_says_that_int8_is_what_runs(name: str) -> None:
    policy = Policy({"a": LayerBits(8, 8), "b": LayerBits(4, 8), "c": LayerBits(4, 8)})
    note = TARGETS[name].note(policy)
    assert note.startswith(f"{name}: 2 of 3 layers have fewer than 8 weight bits: this target stores them packed and computes all ")
    assert "in int8; they " in note
    assert "activations" not in note


def test_the_note_names_what_is_stored_wider_and_what_gains_nothing() -> None:
    policy = Policy({"a": LayerBits(3, 8), "b": LayerBits(5, 4), "c": LayerBits(4, 4), "d": LayerBits(8, 8)})
    assert TARGETS["onnx-container"].note(policy) == (
        "onnx-container: 3 of 4 layers have fewer than 8 weight bits: this target stores them packed and computes all of them in int8; "
        "they make the file smaller, not the network faster; stored wider: 3 bits in 4, 5 bits in 8; "
        "2 have activations below 8 bits, which gain nothing here"
    )
    assert TARGETS["cpu-int8"].note(Policy({"a": LayerBits(4, 8)})) == (
        "cpu-int8: 1 of 1 layers have fewer than 8 weight bits: this target stores and computes all of them in int8; "
        "stored wider: 4 bits in 8"
    )
    assert TARGETS["cpu-int8"].note(uniform_policy(NAMES, LayerBits(8, 8))) == "cpu-int8: 0 of 4 layers have fewer than 8 weight bits"


def measured_in(runtime: str) -> LatencyTable:
    about = {"machine": "a CPU", "threads": 1, "batch_size": 1, "input_shape": (3, 8, 8), "fingerprint": "0"}
    return LatencyTable(runtime=runtime, layers={"a": {"8/8": 1.0}}, network_ms=1.0, float_ms=2.0, **about)


@pytest.mark.parametrize(
    ("runtime", "fitting"),
    [
        ("onnxruntime 1.24.1", {"cpu-int8", "onnx-container"}),
        ("openvino 2026.4.1", {"cpu-int8", "openvino"}),
        ("CMSIS-NN 7", set(TARGETS)),  # of a user's own: nothing is known
    ],
)
def test_times_of_another_runtime_are_told(runtime: str, fitting: set[str]) -> None:
    notes = {name: target.runtime_note(measured_in(runtime)) for name, target in TARGETS.items()}
    assert {name for name, note in notes.items() if note is None} == fitting


def test_the_note_on_another_runtime_names_both_and_the_way_out() -> None:
    note = TARGETS["openvino"].runtime_note(measured_in("onnxruntime 1.24.1"))
    assert note is not None
    assert "(onnxruntime 1.24.1, a CPU, threads: 1, batch: 1) was measured in onnxruntime, and target openvino is" in note
    assert note.endswith("measure there: bitscape latency build --runtime openvino, or take target cpu-int8 or onnx-container")
    other = TARGETS["cortex-m"].runtime_note(measured_in("openvino 1"))
    assert other is not None and other.endswith("leave the table out, or take target cpu-int8 or openvino")


def test_on_an_fpga_every_bit_counts() -> None:
    note = TARGETS["fpga-bitops"].note(uniform_policy(NAMES, LayerBits(3, 3)))
    assert note.startswith("fpga-bitops: 4 of 4 layers") and "every bit counts" in note and "int8" not in note


def test_bytes_of_files_that_store_some_weights_wider() -> None:
    """Layers of 64 weights and 4 scales at 3, 5, 6 and 8 bits."""
    network = measure(nn.Sequential(OrderedDict((name, nn.Conv2d(4, 4, 2)) for name in "abcd")), (4, 8, 8))
    policy = Policy({name: LayerBits(bits, 8) for name, bits in zip("abcd", (3, 5, 6, 8), strict=True)})
    scales = 4 * 4 * 4
    assert container_bytes(network, policy) == {"ONNX": 8 * (4 + 8 + 8 + 8) + scales, "OpenVINO": 8 * (3 + 6 + 6 + 8) + scales}
    assert container_bytes(network, uniform_policy("abcd", LayerBits(6, 8))) == {"ONNX": 8 * 32 + scales}
    assert container_bytes(network, uniform_policy("abcd", LayerBits(4, 8))) == {}
