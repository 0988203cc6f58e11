from pathlib import Path
from typing import Any

import pytest

from benchmarks import common
from bitscape.report.records import append_run, read_runs


@pytest.mark.parametrize(("part", "done"), [("0/1", [0, 2, 3]), ("0/2", [0, 2]), ("1/2", [3])])
def test_every_nth_missing_run_is_done_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, done: list[int]) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    append_run(tmp_path / "b.jsonl", {"method": "m", "seed": 1})
    seen: list[int] = []

    def measure(run: dict[str, Any]) -> dict[str, Any]:
        seen.append(run["seed"])
        return {**run, "top1": 50.0}

    common.do_missing("b", ("method", "seed"), ({"method": "m", "seed": seed} for seed in range(4)), measure, part)
    assert seen == done
    assert [run["seed"] for run in read_runs(tmp_path / "b.jsonl")] == [1, *done]


def test_a_run_that_another_process_has_added_meanwhile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)

    def measure(run: dict[str, Any]) -> dict[str, Any]:
        assert run["seed"] == 0
        append_run(tmp_path / "b.jsonl", {"seed": 1})
        return run

    common.do_missing("b", ("seed",), [{"seed": 0}, {"seed": 1}], measure)
    assert [run["seed"] for run in read_runs(tmp_path / "b.jsonl")] == [1, 0]
