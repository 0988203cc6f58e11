import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitscape.cost.budget import Budget, parse_budget
from bitscape.cost.latency import LatencyTable, with_latency
from bitscape.cost.layers import NetworkProfile, idle_layer, measure
from bitscape.cost.policy_cost import CAPS, cost, layer_cost, policy_cost
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy, fingerprint, uniform_policy

NETWORK = measure(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 10)), (3, 6, 6))
ALONE = {
    "0": {"8/8": 1.0, "4/8": 0.5, "4/4": 0.25},
    "1": {"8/8": 2.0, "4/8": 2.5, "4/4": 1.5},
    "3": {"8/8": 1.0, "4/8": 1.0, "4/4": 0.5},
}
VALUES: dict[str, Any] = {
    "runtime": "openvino 2026.4.1",
    "machine": "Xeon",
    "threads": 1,
    "batch_size": 2,
    "input_shape": (3, 6, 6),
    "fingerprint": fingerprint(NETWORK.shapes),
    "network_ms": 3.0,
    "float_ms": 26.6,
    "layers": ALONE,
}
TABLE = LatencyTable(**VALUES)
JOINED = with_latency(NETWORK, TABLE)

TIMES = st.floats(1e-6, 1e6)
PAIRS = [str(LayerBits(w, a)) for w, a in product(range(1, 9), repeat=2)]
COUNTS = st.integers(1, 64)


@st.composite
def tables(draw: st.DrawFn) -> LatencyTable:
    times = st.dictionaries(st.sampled_from(PAIRS), TIMES, max_size=4)
    layers = draw(st.dictionaries(st.text(), times, min_size=1, max_size=4))
    return LatencyTable(
        runtime=draw(st.text(min_size=1)),
        machine=draw(st.text(min_size=1)),
        threads=draw(COUNTS),
        batch_size=draw(COUNTS),
        input_shape=tuple(draw(st.lists(COUNTS, min_size=1, max_size=3))),
        fingerprint="52ef8e3cb6e2a7d1",
        network_ms=draw(TIMES),
        float_ms=draw(TIMES),
        layers={name: {**row, "8/8": draw(TIMES)} for name, row in layers.items()},
    )


def policy(*pairs: tuple[int, int]) -> Policy:
    return Policy({name: LayerBits(*pair) for name, pair in zip(NETWORK.by_name, pairs, strict=True)})


@given(tables())
def test_a_saved_table_loads_equal(tmp_path_factory: pytest.TempPathFactory, table: LatencyTable) -> None:
    path = tmp_path_factory.getbasetemp() / "latency.json"
    table.save(path)
    assert LatencyTable.load(path) == table


def test_the_file_has_one_layer_a_line(tmp_path) -> None:
    path = tmp_path / "latency.json"
    TABLE.save(path)
    assert path.read_text().splitlines()[-5:] == [
        '    "0": {"8/8": 1.0, "4/8": 0.5, "4/4": 0.25},',
        '    "1": {"8/8": 2.0, "4/8": 2.5, "4/4": 1.5},',
        '    "3": {"8/8": 1.0, "4/8": 1.0, "4/4": 0.5}',
        "  }",
        "}",
    ]
    assert json.loads(path.read_text())["format"] == 1


def test_every_cut_of_a_file_is_refused(tmp_path) -> None:
    path = tmp_path / "latency.json"
    TABLE.save(path)
    content = path.read_bytes().rstrip()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BitscapeError, match=r"latency\.json: .*complete"):
            LatencyTable.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 2', "format 2 is unknown; this version reads format 1"),
        ('"format": 1,', "", 'must be an object with "format" and "layers"'),
        ('"runtime"', '"runtimes"', "unknown entry 'runtimes'; nearest: runtime"),
        ('"threads": 1,', "", "entry 'threads' is missing"),
        ('"threads": 1', '"threads": 0', "'threads' is 0; allowed are whole numbers from 1"),
        ('"threads": 1', '"threads": true', "'threads' is True"),
        ('"batch_size": 2', '"batch_size": 2.0', "'batch_size' is 2.0"),
        ('"machine": "Xeon"', '"machine": ""', "'machine' is ''; allowed are a text"),
        ("[3, 6, 6]", "[3, 0, 6]", "'input_shape' is [3, 0, 6]"),
        ("[3, 6, 6]", "3", "'input_shape' is 3"),
        ('"network_ms": 3.0', '"network_ms": NaN', "NaN is no allowed number"),
        ('"network_ms": 3.0', '"network_ms": 1e999', "1e999 is no allowed number"),
        ('"network_ms": 3.0', '"network_ms": 1' + "0" * 400, "0 is no allowed number"),
        ('"float_ms": 26.6', '"float_ms": 0', "float_ms is 0; allowed are milliseconds above 0"),
        ('"8/8": 2.0', '"8/8": -2.0', "layer '1' at 8/8 bits is -2.0"),
        ('"8/8": 2.0', '"8/8": "2"', "layer '1' at 8/8 bits is '2'"),
        ('"8/8": 2.0', '"8/8": true', "layer '1' at 8/8 bits is True"),
        ('"8/8": 2.0', '"7/8": 2.0', "layer '1' is {'7/8': 2.0"),
        ('"4/8": 2.5', '"9/8": 2.5', "layer '1': '9/8' is no pair of bits; write weight/activation bits"),
        ('"4/8": 2.5', '"04/8": 2.5', "layer '1': '04/8' is no pair"),
        ('"4/8": 2.5', '"/8": 2.5', "layer '1': '/8' is no pair"),
        ('"4/8": 2.5', '"8/8": 2.5', "'8/8' stands twice"),
        ('"1": {', '"0": {', "'0' stands twice"),
    ],
)
def test_an_invalid_file_is_refused_with_its_name_and_entry(tmp_path, old: str, new: str, message: str) -> None:
    path = tmp_path / "latency.json"
    TABLE.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(BitscapeError) as caught:
        LatencyTable.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_table_without_layers_is_refused() -> None:
    with pytest.raises(BitscapeError, match=r"'layers' is \{\}; allowed are an object with at least one layer"):
        LatencyTable(**{**VALUES, "layers": {}})


def test_times_are_scaled_to_the_network() -> None:
    # Alone the layers take 4 ms at 8/8 together, the network takes 3: every time counts three quarters.
    assert cost("latency_ms", JOINED, policy((8, 8), (8, 8), (8, 8))) == 3.0
    assert cost("latency_ms", JOINED, policy((4, 8), (8, 8), (4, 4))) == 0.75 * (0.5 + 2.0 + 0.5)
    assert cost("latency_ms", JOINED, policy((4, 8), (4, 8), (4, 8))) == 0.75 * (0.5 + 2.5 + 1.0)
    assert layer_cost("latency_ms", JOINED.by_name["1"], LayerBits(4, 8)) == 1_875_000


@given(st.lists(TIMES, min_size=3, max_size=3), TIMES)
def test_the_network_at_8_bits_takes_what_was_measured(alone: list[float], network_ms: float) -> None:
    layers = {name: {"8/8": ms} for name, ms in zip(NETWORK.by_name, alone, strict=True)}
    joined = with_latency(NETWORK, replace(TABLE, layers=layers, network_ms=network_ms))
    predicted = cost("latency_ms", joined, uniform_policy(NETWORK.by_name, LayerBits(8, 8)))
    assert predicted == pytest.approx(network_ms, abs=1.5e-6, rel=1e-12)


def test_latency_is_a_cost_only_where_a_table_was_joined() -> None:
    uniform = uniform_policy(NETWORK.by_name, LayerBits(4, 4))
    assert set(CAPS) - set(policy_cost(NETWORK, uniform)) == {"latency_ms", "flash_bytes", "sram_bytes"}
    assert policy_cost(JOINED, uniform) == {**policy_cost(NETWORK, uniform), "latency_ms": 0.75 * 2.25}
    with pytest.raises(BitscapeError, match=r"no latency table was given.*bitscape latency build.*--latency"):
        cost("latency_ms", NETWORK, uniform)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2.5", 2.5), ("2.5ms", 2.5), ("2.5 MS", 2.5), ("0.9x", 2.7), ("w4a4", 0.75 * 2.25), ("w8a8", 3.0)],
)
def test_budgets_in_milliseconds(text: str, value: float) -> None:
    assert parse_budget(f"latency_ms={text}", JOINED).caps == {"latency_ms": pytest.approx(value, rel=1e-12)}
    assert parse_budget({"latency_ms": value}, JOINED).limits(JOINED) == {"latency_ms": round(value * 10**6)}


def test_a_cap_in_milliseconds_holds_to_the_nanosecond() -> None:
    slow = policy((8, 8), (8, 8), (4, 4))
    assert Budget({"latency_ms": 2.625}).exceeded(JOINED, slow) == {}
    assert Budget({"latency_ms": 2.624999}).exceeded(JOINED, slow) == {"latency_ms": 2.625}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4", "does not say the activation bits"),
        ("2.5s", r"'2.5s' is not a positive amount; write latency_ms= a number \(2.5 or 2.5ms\), .* \(w4a4\)"),
        ("w2a8", "layer '0' was not measured at 2/8 .*only at 8/8, 4/8, 4/4; .*--candidates.*bitscape latency build"),
    ],
)
def test_budgets_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        parse_budget(f"latency_ms={text}", JOINED)


def test_a_budget_in_milliseconds_needs_a_table() -> None:
    with pytest.raises(BitscapeError, match=r"budget latency_ms='2.5': no latency table was given.*bitscape latency build"):
        parse_budget("latency_ms=2.5", NETWORK)


def test_a_layer_that_is_never_called_takes_no_time() -> None:
    idle = replace(NETWORK, never_called=(idle_layer("idle", nn.Linear(4, 4)),))
    joined = with_latency(idle, replace(TABLE, fingerprint=fingerprint(idle.shapes)))
    bits = {**policy(*[(8, 8)] * 3).layers, "idle": LayerBits(2, 2)}
    assert cost("latency_ms", joined, Policy(bits)) == 3.0


def _without(name: str) -> dict[str, Any]:
    return {"layers": {other: times for other, times in ALONE.items() if other != name}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {**ALONE, "33": ALONE["3"]}}, "no layer '33'; nearest: 3.*bitscape latency build"),
        (_without("3"), "layer '3' was not measured.*bitscape latency build"),
        ({"fingerprint": "0123456789abcdef"}, f"0123456789abcdef.*{fingerprint(NETWORK.shapes)}.*differ"),
        ({"input_shape": (3, 8, 8)}, "images of 3x8x8, and these have 3x6x6"),
    ],
)
def test_a_table_of_another_network_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        with_latency(NETWORK, replace(TABLE, **changes))


def test_the_spread_is_of_the_network_at_the_fastest_uniform_bits() -> None:
    assert TABLE.spread() == (0.25 + 1.5 + 0.5) / 4
    assert TABLE.note() is None
    crossed = {"0": {"8/8": 1.0, "4/8": 0.5, "2/8": 1.5}, "1": {"8/8": 1.0, "4/8": 1.5, "2/8": 0.5}}
    assert replace(TABLE, layers=crossed).spread() == 1  # 0.5 would be the fastest bits of each layer
    at_eight = {"0": {"8/8": 1.0}, "1": {"8/8": 3.0, "4/8": 2.0}}
    assert replace(TABLE, layers=at_eight).spread() == 0.75  # a layer that was not measured at 4 bits stays at 8
    assert replace(TABLE, layers={name: {"8/8": times["8/8"]} for name, times in ALONE.items()}).spread() == 1


@pytest.mark.parametrize(("saved", "flat"), [(-0.1, True), (0.0, True), (0.029, True), (0.031, False)])
def test_a_flat_table_says_that_bytes_are_what_fewer_bits_buy(saved: float, flat: bool) -> None:
    table = replace(TABLE, layers={name: {"8/8": 1.0, "4/8": 1 - saved} for name in ALONE})
    note = table.note()
    assert (note is not None) == flat
    if note is not None:
        assert "flat below 8 bits" in note and "cap in ms cannot be met by fewer bits" in note and "weight_bytes" in note
        assert "openvino 2026.4.1, Xeon, threads: 1, batch: 2" in note


def noisy(saved: float, noise: float, forms: int = 20, copies: int = 1, seed: int = 0) -> LatencyTable:
    """Layers of 1 ms at 8/8, of `forms` forms; 4/8 and 2/8 take 1 - saved, and every time is off by `noise`."""
    random = Random(seed)
    times = {"8/8": 1, "4/8": 1 - saved, "2/8": 1 - saved}
    rows = [{bits: ms * random.lognormvariate(0, noise) for bits, ms in times.items()} for _ in range(forms)]
    return replace(TABLE, layers={f"{at}.{copy}": row for at, row in enumerate(rows) for copy in range(copies)})


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_noise_is_not_taken_for_a_saving(noise: float) -> None:
    tables = [noisy(0, noise, seed=seed) for seed in range(100)]
    assert sum(table.note() is None for table in tables) <= 15
    assert all(noisy(0.4, noise, seed=seed).note() is None for seed in range(100))


def ratios(**shares: tuple[float, float] | float) -> LatencyTable:
    """Layers with their time at 8/8, 1 ms unless given, and their share of it at 4/8; each of a form of its own."""
    pairs = {name: value if isinstance(value, tuple) else (1.0, value) for name, value in shares.items()}
    return replace(TABLE, layers={name: {"8/8": ms + at * 1e-9, "4/8": ms * share} for at, (name, (ms, share)) in enumerate(pairs.items())})


def test_a_saving_that_noise_would_explain_is_told_with_its_margin() -> None:
    # 4 layers at 0.5, 0.5, 1.3, 1.3: the ratio is 0.9, off by 0.4 each; twice sqrt(4 * 0.16 * 4 / 3) / 4 is 0.4619
    note = ratios(a=0.5, b=0.5, c=1.3, d=1.3).note()
    assert note is not None and "leaves open whether fewer bits are faster" in note
    assert "at 4/8, the fastest, the network takes 90.0 % of its time at 8/8, give or take 46.2 points" in note
    assert "measure again with more --rounds" in note


def test_a_saving_of_few_layers_is_not_called_noise_flatly() -> None:
    convs = {f"conv{at}": (1.01, 1.0) for at in range(19)}  # 4 of 27.2 ms
    note = ratios(**convs, fc=(8.0, 0.5)).note()
    assert note is not None and "takes 85.3 % of its time at 8/8, give or take 21.9 points" in note
    assert "the 14.7 % saved are from some layers (most: fc), or noise; measure again" in note
    note = ratios(**convs, fc1=(2.0, 0.5), fc2=(3.2, 0.5), fc3=(3.0, 0.5)).note()  # 1, 1.6 and 1.5 ms
    assert note is not None and "(most: fc2, fc3)" in note
    note = ratios(**{f"fc{at}": 0.9 - at / 1000 for at in range(12)}, conv=(2.0, 1.2)).note()  # half of 0.87 ms would be four
    assert note is not None and "(most: fc11, fc10, fc9)" in note


def test_noise_without_a_saving_is_told_as_possible_noise() -> None:
    note = noisy(0, 0.3, seed=2).note()
    assert note is not None and "leaves open whether" in note and "or noise" in note


def test_layers_that_were_not_measured_at_a_pair_add_no_doubt() -> None:
    halved = {f"conv{at}": {"8/8": 1.0 + at, "4/8": 0.5 * (1.0 + at)} for at in range(3)}
    pinned = {f"pinned{at}": {"8/8": 1.0 + at / 100} for at in range(10)}
    table = replace(TABLE, layers={**halved, **pinned})
    assert table.spread() == pytest.approx(1 - 3 / 16.45, rel=1e-12)
    assert table.note() is None


def test_layers_of_one_form_were_measured_once_and_count_as_one() -> None:
    one, many = noisy(0.1, 0.1, forms=5), noisy(0.1, 0.1, forms=5, copies=50)
    assert one.spread() == pytest.approx(many.spread(), rel=1e-12)
    notes = one.note(), many.note()
    assert None not in notes and len({str(note).partition("(most")[0] for note in notes}) == 1  # the margins agree


def test_a_layer_run_twice_and_a_shared_weight_keep_their_own_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(self.one(x)))

    network: NetworkProfile = measure(Twice(), (4,))
    layers = {"one": {"8/8": 2.0}, "two": {"8/8": 1.0}}
    changes = {"layers": layers, "fingerprint": fingerprint(network.shapes), "input_shape": (4,)}
    joined = with_latency(network, replace(TABLE, **changes))
    assert {layer.name: layer.latency_ns[LayerBits(8, 8)] for layer in joined.layers} == {"one": 2_000_000, "two": 1_000_000}


BYTES = {"flash": {name: dict.fromkeys(row, 100) for name, row in ALONE.items()}, "sram": {}}


def test_a_table_of_a_compiler_has_flash_and_no_float(tmp_path: Path) -> None:
    table = replace(TABLE, float_ms=None, flash={**BYTES["flash"], "0": {"8/8": 70, "4/8": 30, "4/4": 20}})
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table and not table.sram
    joined = with_latency(NETWORK, table)
    policy = uniform_policy(NETWORK.shapes, LayerBits(4, 8))
    assert cost("flash_bytes", joined, policy) == 230
    assert "flash_bytes" in policy_cost(joined, policy) and "sram_bytes" not in policy_cost(joined, policy)
    with pytest.raises(BitscapeError, match="sram_bytes: the latency table has times alone"):
        cost("sram_bytes", joined, policy)


@pytest.mark.parametrize("flash", [{"0": {"8/8": 1}}, {**BYTES["flash"], "0": {"8/8": 1}}, {**BYTES["flash"], "3": 7}])
def test_flash_is_of_all_layers_at_the_same_bits(flash: Any) -> None:
    with pytest.raises(BitscapeError, match="'flash' must hold the layers of the table at the same bits"):
        replace(TABLE, flash=flash)


def test_bytes_are_whole_numbers() -> None:
    with pytest.raises(BitscapeError, match=r"sram of layer '0' at 8/8 bits.*whole numbers from 0"):
        replace(TABLE, sram={**BYTES["flash"], "0": {"8/8": 1.5, "4/8": 1, "4/4": 1}})


def test_widths_that_were_not_varied_do_not_matter() -> None:
    assert CAPS["latency_ms"].widths(JOINED) == {"weight", "activation"}
    of_weights = {name: {pair: ms for pair, ms in row.items() if pair.endswith("/8")} for name, row in ALONE.items()}
    assert CAPS["latency_ms"].widths(with_latency(NETWORK, replace(TABLE, layers=of_weights))) == {"weight"}


def test_a_table_keeps_the_coarseness_of_the_weights_that_were_compiled(tmp_path: Path) -> None:
    coarse = replace(TABLE, coarseness=2.0)
    coarse.save(tmp_path / "coarse.json")
    TABLE.save(tmp_path / "usual.json")
    assert LatencyTable.load(tmp_path / "coarse.json") == coarse
    assert "coarseness" not in json.loads((tmp_path / "usual.json").read_text())
    with pytest.raises(BitscapeError, match="'coarseness' is 0; allowed are numbers above 0"):
        replace(TABLE, coarseness=0)
