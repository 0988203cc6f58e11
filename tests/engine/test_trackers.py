import importlib.util
import json
import logging
import sys
from types import ModuleType
from typing import Any

import pytest

from bitscape.engine import Sgd, TensorBoard, train, workers
from bitscape.engine import trackers as trackers_module
from bitscape.errors import BitscapeError
from bitscape.steps import Plain
from tests.engine.tiny import same_state, tiny_batches, tiny_net

USUAL: dict[str, Any] = {"step": Plain(), "optimizer": Sgd(lr=0.05)}


class Noted:
    """Notes what it is told; fails in the call named."""

    def __init__(self, fails_in: str = "") -> None:
        self.calls: list[str] = []
        self.records: list[Any] = []
        self.fails_in = fails_in

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise OSError("no route")

    def start(self, settings: Any, records: Any) -> None:
        self.settings, self.before = settings, records
        self._call("start")

    def epoch(self, record: Any) -> None:
        self.records.append(record)
        self._call("epoch")

    def finish(self) -> None:
        self._call("finish")


def test_a_tracker_is_told_what_the_run_records(tmp_path) -> None:
    noted = Noted()
    result = train(tiny_net(), tiny_batches(), **USUAL, epochs=2, folder=tmp_path, trackers=(noted,))
    assert noted.calls == ["start", "epoch", "epoch", "finish"]
    assert noted.records == list(result.records) and noted.before == ()
    assert noted.records == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert json.loads(json.dumps(noted.settings)) == json.loads((tmp_path / "run.json").read_text())["settings"]


def test_a_run_that_goes_on_tells_what_was_before(tmp_path) -> None:
    whole = train(tiny_net(), tiny_batches(), **USUAL, epochs=3)

    def stop(epoch: int) -> dict[str, float]:
        if epoch == 3:
            raise KeyboardInterrupt
        return {}

    first, second = Noted(), Noted()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_net(), tiny_batches(), **USUAL, epochs=3, folder=tmp_path, after_epoch=stop, trackers=(first,))
    train(tiny_net(), tiny_batches(), **USUAL, epochs=3, folder=tmp_path, trackers=(second,))
    assert first.calls == ["start", "epoch", "epoch", "finish"]
    assert [record["epoch"] for record in second.before] == [1, 2]
    assert [record["loss"] for record in (*first.records, *second.records)] == [record["loss"] for record in whole.records]


@pytest.mark.parametrize(("fails_in", "calls"), [("start", 1), ("epoch", 2), ("finish", 4)])
def test_a_tracker_that_fails_is_logged_once_and_changes_nothing(fails_in, calls, caplog) -> None:
    broken, other, alone, watched = Noted(fails_in), Noted(), tiny_net(), tiny_net()
    train(alone, tiny_batches(), **USUAL, epochs=2)
    with caplog.at_level(logging.WARNING, "bitscape.engine"):
        train(watched, tiny_batches(), **USUAL, epochs=2, trackers=(broken, other))
    assert len(broken.calls) == calls and other.calls == ["start", "epoch", "epoch", "finish"]
    assert [record.getMessage() for record in caplog.records] == ["tracker Noted failed and is left out from here on: OSError: no route"]
    assert same_state(alone, watched)


def test_a_record_that_a_tracker_changes_stays_what_it_was() -> None:
    class Careless(Noted):
        def epoch(self, record: Any) -> None:
            record.clear()

    (record,) = train(tiny_net(), tiny_batches(), **USUAL, epochs=1, trackers=(Careless(),)).records
    assert record["epoch"] == 1


def test_only_the_first_worker_is_watched(monkeypatch) -> None:
    noted = Noted()
    monkeypatch.setattr(workers, "rank", lambda: 1)
    train(tiny_net(), tiny_batches(), **USUAL, epochs=1, trackers=(noted,))
    assert noted.calls == []


class Writer:
    """Stands for SummaryWriter; all of them write into one list."""

    written: list[Any]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.written.append((folder, purge_step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.written.append((name, "epochs" in text, step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.written.append("closed")


def test_tensorboard_gets_every_number_and_hides_what_comes_again(monkeypatch, tmp_path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.written = written = []
    (record,) = train(tiny_net(), tiny_batches(), **USUAL, epochs=1, trackers=(TensorBoard(tmp_path),)).records
    numbers = [(name, value, 1) for name, value in record.items() if name != "epoch"]
    assert written == [(str(tmp_path), 1), ("settings", True, 1), *numbers, "closed"]
    tracker = trackers_module.TRACKERS["tensorboard"]("again")
    tracker.start({}, [record])
    assert written[-2] == ("again", 2)


def test_without_tensorboard_the_extra_is_named_before_the_run(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BitscapeError, match=r"pip install 'bitscape\[tensorboard\]'"):
        TensorBoard("here")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_tensorboard_continues_its_curves(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(last: int) -> list[Any]:
        def stop(epoch: int) -> dict[str, float]:
            if epoch == last + 1:
                raise KeyboardInterrupt
            return {}

        found = []
        try:
            options = {"folder": tmp_path / "run", "after_epoch": stop, "trackers": (TensorBoard(tmp_path / "board"),)}
            found = list(train(tiny_net(), tiny_batches(), **USUAL, epochs=4, **options).records)
        except KeyboardInterrupt:
            pass
        return found

    run(2)
    records = run(4)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (record["epoch"], pytest.approx(record["loss"])) for record in records
    ]
    assert len(records) == 4
