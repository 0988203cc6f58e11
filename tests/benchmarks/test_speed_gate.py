import json
from pathlib import Path

import pytest

from benchmarks import speed_gate
from benchmarks.speed_gate import FILE, GATE, main, measured


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A gate of two ratios, 1.2 and 3; its file."""
    monkeypatch.setattr(speed_gate, "FILE", tmp_path / "gate.json")
    monkeypatch.setattr(speed_gate, "GATE", {"one": (1.2, 1), "other": (3.0, 1)})
    monkeypatch.setattr(speed_gate, "measured", lambda ratio, _: ratio)
    monkeypatch.setattr(speed_gate, "keep_freed_memory", lambda: True)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    return tmp_path / "gate.json"


def test_what_is_stored_passes(gate: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["gate", "--store"])
    main()
    assert json.loads(gate.read_text())["ratios"] == {"one": 1.2, "other": 3.0}
    monkeypatch.setattr("sys.argv", ["gate"])
    main()


def test_a_ratio_that_grew_is_named_with_both_values_and_the_tolerance(gate: Path, monkeypatch: pytest.MonkeyPatch):
    gate.write_text(json.dumps({"ratios": {"one": 1.0, "other": 2.9}}))
    monkeypatch.setattr("sys.argv", ["gate"])
    with pytest.raises(SystemExit) as stopped:
        main()
    first, advice = str(stopped.value).splitlines()
    assert first == "slower: one: 1.200, stored 1.000, tolerance 15%"
    assert advice == "`make speed STORE=1` on a quiet machine stores new ratios"


def test_a_ratio_is_the_time_of_ours_over_that_of_plain_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed_gate, "seconds_in_turn", lambda *_: {"plain": [1.0, 2.0, 2.0], "ours": [2.0, 6.0, 5.0]})
    assert measured(lambda: (lambda: None, lambda: None), 3) == 2.5


def test_every_ratio_is_stored():
    assert set(json.loads(FILE.read_text())["ratios"]) == set(GATE)
