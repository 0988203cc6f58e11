import signal
from pathlib import Path

import pytest

from bitscape.engine import Sgd, train
from bitscape.engine.checkpoint import load_checkpoint
from bitscape.engine.stopping import Stop, Stopping
from bitscape.folders import CHECKPOINT
from bitscape.steps import Plain
from tests.engine.tiny import same_state, tiny_batches, tiny_net

pytestmark = pytest.mark.signals

USUAL = {"step": Plain(), "optimizer": Sgd(lr=0.05), "epochs": 3}


class Signalled:
    """A step that gets signals while it computes."""

    def __init__(self, number: signal.Signals, batch: int, times: int = 1) -> None:
        self.number, self.batch, self.times, self.batches = number, batch, times, 0

    def __call__(self, model, batch):
        self.batches += 1
        if self.batches == self.batch:
            for _ in range(self.times):
                signal.raise_signal(self.number)
        return Plain()(model, batch)

    def __eq__(self, other: object) -> bool:
        return True


@pytest.fixture
def terminable():
    """SIGTERM as an exception, as the command line has it."""

    def interrupt(number, frame):
        raise KeyboardInterrupt("terminated")

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    assert signal.getsignal(signal.SIGTERM) is interrupt
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_batch_from_which_the_run_goes_on(number, tmp_path: Path, terminable) -> None:
    whole, stopped, resumed = tiny_net(), tiny_net(), tiny_net(seed=9)
    train(whole, tiny_batches(), **USUAL)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tiny_batches(), **{**USUAL, "step": Signalled(number, batch=7)}, folder=tmp_path)
    _, header = load_checkpoint(tmp_path / CHECKPOINT)
    assert header["epoch"] * len(tiny_batches()) + header["batch"] == 7
    train(resumed, tiny_batches(), **{**USUAL, "step": Signalled(number, batch=-1)}, folder=tmp_path)
    assert same_state(whole, resumed)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_net(), tiny_batches(), **{**USUAL, "step": Signalled(signal.SIGINT, batch=2, times=2)}, folder=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_run_without_a_folder_stops_too() -> None:
    step = Signalled(signal.SIGINT, batch=2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_net(), tiny_batches(), **{**USUAL, "step": step})
    assert step.batches == 2


def test_validation_is_interrupted_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args, **settings):
        signal.raise_signal(signal.SIGINT)

    whole, resumed = tiny_net(), tiny_net(seed=9)
    settings = {**USUAL, "validation": tiny_batches(), "ema_decay": 0.9}
    expected = train(whole, tiny_batches(), **settings)
    with monkeypatch.context() as patched:
        patched.setattr("bitscape.engine.loop.measured", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_net(), tiny_batches(), **settings, folder=tmp_path)
    _, header = load_checkpoint(tmp_path / CHECKPOINT)
    assert (header["epoch"], header["batch"]) == (0, len(tiny_batches()))
    result = train(resumed, tiny_batches(), **settings, folder=tmp_path)
    assert same_state(whole, resumed)
    assert [record["validation_loss"] for record in result.records] == [record["validation_loss"] for record in expected.records]


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping().held_back():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_comes_back_does_not_make_a_stopped_run_look_finished() -> None:
    noted = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), Stopping().held_back():
            signal.raise_signal(signal.SIGTERM)
            raise Stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [signal.SIGTERM]
