import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.scores import ScoreTable

PAIRS = (LayerBits(2, 2), LayerBits(4, 8))


def table(values: object, layers: tuple[str, ...] = ("a", "b"), candidates: tuple[LayerBits, ...] = PAIRS) -> ScoreTable:
    return ScoreTable(layers, candidates, np.array(values), "test", 3)


@given(arrays(np.float64, (2, 2), elements=st.floats(allow_nan=False, allow_infinity=False)))
def test_saved_scores_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    values[0, 1] = math.inf
    saved = table(values)
    saved.save(path)
    loaded = ScoreTable.load(path)
    assert loaded.values.tobytes() == saved.values.tobytes()
    assert (loaded.layers, loaded.candidates, loaded.method, loaded.repairs) == (("a", "b"), PAIRS, "test", 3)


def test_the_fingerprint_is_kept_and_may_be_left_out(tmp_path: Path) -> None:
    replace(table([[1, 1], [1, 1]]), fingerprint="52ef8e3cb6e2a7d1").save(tmp_path / "s.json")
    assert ScoreTable.load(tmp_path / "s.json").fingerprint == "52ef8e3cb6e2a7d1"
    document = json.loads((tmp_path / "s.json").read_text())
    del document["fingerprint"]
    (tmp_path / "s.json").write_text(json.dumps(document))
    assert ScoreTable.load(tmp_path / "s.json").fingerprint is None
    (tmp_path / "s.json").write_text(json.dumps({**document, "fingerprint": 5}))
    with pytest.raises(BitscapeError, match="fingerprint is 5; allowed is a text"):
        ScoreTable.load(tmp_path / "s.json")


def test_a_table_without_layers_comes_back(tmp_path: Path) -> None:
    table(np.zeros((0, 2)), ()).save(tmp_path / "s.json")
    assert ScoreTable.load(tmp_path / "s.json").values.shape == (0, 2)


def test_values_are_a_read_only_copy() -> None:
    values = np.ones((2, 2))
    made = table(values)
    values[0, 0] = 5
    assert made.values[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        made.values[0, 0] = 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, math.nan], [1, 1]], "layer 'a' has score nan at 4/8 bits"),
        ([[1, 1], [-math.inf, 1]], "layer 'b' has score -inf at 2/2"),
        ([[1, 1], [math.inf, math.inf]], "every pair of layer 'b' is forbidden"),
        ([[1, 1]], r"shape \(1, 2\); it must be \(layers, candidates\) = \(2, 2\)"),
    ],
)
def test_bad_values_are_refused(values: list[list[float]], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        table(values)


def test_names_and_pairs_must_differ() -> None:
    with pytest.raises(BitscapeError, match="'a' stands twice"):
        table(np.ones((2, 2)), ("a", "a"))
    with pytest.raises(BitscapeError, match="2/2 stands twice"):
        table(np.ones((2, 2)), candidates=(LayerBits(2, 2), LayerBits(2, 2)))
    with pytest.raises(BitscapeError, match="none given"):
        table(np.ones((2, 0)), candidates=())
    with pytest.raises(BitscapeError, match="no LayerBits"):
        table(np.ones((2, 1)), candidates=((4, 4),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is the file complete"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2 is unknown"),
        (lambda text: text.replace('"repairs": 3,', ""), "repairs is missing"),
        (lambda text: text.replace('"repairs": 3,', '"repairs": 3.5,'), "repairs is 3.5; allowed is a whole number"),
        (lambda text: text.replace('"repairs": 3,', '"repairs": -3,'), "repairs is -3"),
        (lambda text: text.replace('"method": "test"', '"method": ["test"]'), "method is .'test'.; allowed is a text"),
        (lambda text: text.replace('"method"', '"methods"'), "unknown entry 'methods'; nearest: method"),
        (lambda text: text.replace('"4/8"', '"4-8"'), "candidates: bits '4-8': write weight/activation bits"),
        (lambda text: text.replace('"4/8"', '"4/9"'), "candidates: activation bits are 9; allowed are whole numbers from 1 to 8 and 16"),
        (lambda text: text.replace('"4/8"', "4"), "candidates: bits '4': write weight/activation bits"),
        (lambda text: text.replace("[1.0, 1.0]", "[1.0]", 1), "layer 'a' is .1.0.; it must be a list of 2 scores"),
        (lambda text: text.replace("[1.0, 1.0]", '"11"', 1), "layer 'a' is '11'; it must be a list"),
        (lambda text: text.replace("[1.0, 1.0]", '["1.0", 1.0]', 1), "layer 'a' has the score '1.0'; allowed are finite numbers"),
        (lambda text: text.replace("[1.0, 1.0]", "[true, 1.0]", 1), "layer 'a' has the score True"),
        (lambda text: text.replace("[1.0, 1.0]", f"[1{'0' * 400}, 1.0]", 1), "1000+.* is no allowed number"),
        (lambda text: text.replace("[1.0, 1.0]", "[1e999, 1.0]", 1), "1e999 is no allowed number"),
        (lambda text: text.replace("[1.0, 1.0]", "[NaN, 1.0]", 1), "NaN is no allowed number"),
        (lambda text: text.replace("[1.0, 1.0]", f"[{'[' * 50_000}", 1), "not readable as JSON"),
        (lambda text: text.replace('"b"', '"a"'), "'a' stands twice"),
        (lambda text: "[]", "not a score file"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "scores.json"
    table(np.ones((2, 2))).save(path)
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(BitscapeError, match=message) as raised:
        ScoreTable.load(path)
    assert "scores.json" in str(raised.value)


def test_a_table_prints_its_ends() -> None:
    few = table([[0.5, np.inf], [1e-9, 2]])
    first, head, *rows = repr(few).splitlines()
    assert first == f"ScoreTable: {few.method}, 2 layers, 2 pairs of bits"
    assert head.split() == ["layer", *map(str, few.candidates)]
    assert [row.split() for row in rows] == [["a", "0.5", "inf"], ["b", "1e-09", "2"]]
    pairs = tuple(LayerBits(w, a) for w in range(1, 9) for a in range(1, 9))
    many = table(np.zeros((100, 64)), tuple(f"layer{at}" for at in range(100)), pairs)
    lines = repr(many).splitlines()
    assert len(lines) == 10 and lines[1].split() == ["layer", "1/1", "1/2", "1/3", "...", "8/6", "8/7", "8/8"]
    assert lines[6].split() == ["..."] * 8
