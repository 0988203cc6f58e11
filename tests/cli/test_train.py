import json
import os
import signal
import threading

import pytest

from bitscape.folders import locked
from bitscape.policy import LayerBits, Policy
from bitscape.steps.plain import Plain
from tests.cli.run import MODEL, run_cli

pytestmark = pytest.mark.slow

TRAIN = ("train", *MODEL, "--data", "digits", "--batch-size", 256)


def _quantized(trained, *options):
    return (*TRAIN, "--weights", trained / "model.safetensors", "--policy", trained / "mixed.json", *options)


def test_trains_in_float_and_reports_each_epoch(cli, tmp_path):
    shown = cli(*TRAIN, "--validation", "digits", "--epochs", 2, "--lr", 0.1, "--out", tmp_path / "run")
    table = shown.out.splitlines()
    assert table[0].split()[0] == "epoch"
    assert "validation top-1 %" in table[0]
    assert "images/s" in table[0]
    assert [line.split()[0] for line in table[1:3]] == ["1", "2"]
    assert {file.name for file in (tmp_path / "run").iterdir()} >= {"model.safetensors", "metrics.jsonl", "run.json"}


def test_trains_at_the_bits_of_a_policy_with_every_extra(cli, trained, tmp_path):
    extras = ("--distill", 0.5, "--ema", 0.9, "--label-smoothing", 0.1, "--optimizer", "adamw", "--autocast", "bf16")
    run = tmp_path / "run"
    cli(*_quantized(trained, *extras, "--augment", "crop-flip", "--epochs", 1, "--out", run))
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["optimizer"]["kind"] == "AdamW"
    assert settings["loss"]["distillation"] == 0.5
    assert settings["batches"]["augment"] == "crop-flip"
    assert (run / "policy.json").read_text() == (trained / "mixed.json").read_text()
    assert "top-1" in cli("evaluate", *MODEL, "--data", "digits", "--checkpoint", run).out


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(cli, refused, trained, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cli(*_quantized(trained, "--epochs", 2, "--out", whole))
    calls, step = [], Plain.__call__

    def interrupt(self, *args):
        calls.append(None)
        if len(calls) == 8:  # in the second epoch of 6 batches
            raise KeyboardInterrupt
        return step(self, *args)

    again = _quantized(trained, "--epochs", 2, "--out", broken)
    with monkeypatch.context() as patched:
        patched.setattr(Plain, "__call__", interrupt)
        shown = run_cli(*again)
    assert shown.code == 130
    assert "--resume" in shown.err
    assert "no model.safetensors" in refused("evaluate", *MODEL, "--data", "digits", "--checkpoint", broken)
    assert "add --resume to go on" in refused(*again)
    cli(*again, "--resume")
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_with_other_settings_is_told_what_to_do(cli, refused, tmp_path):
    cli(*TRAIN, "--epochs", 1, "--out", tmp_path / "run")
    line = refused(*TRAIN, "--epochs", 2, "--out", tmp_path / "run", "--resume")
    assert line.endswith("epochs was 1 and is 2; pass those settings, or start over in another folder")


def test_a_run_at_other_bits_is_told_which(cli, refused, trained, tmp_path):
    policy, options = Policy.load(trained / "mixed.json"), ("--epochs", 1, "--out", tmp_path / "run")
    cli(*_quantized(trained, *options))
    name, bits = next((name, bits) for name, bits in policy.layers.items() if bits.weight > 1)
    Policy({**policy.layers, name: LayerBits(bits.weight - 1, bits.activation)}).save(tmp_path / "other.json")
    line = refused(*_quantized(trained, *options, "--policy", tmp_path / "other.json", "--resume"))
    expected = f"bits.{name}.weight was {bits.weight} and is {bits.weight - 1}; pass those settings, or start over in another folder"
    assert line.endswith(expected)


def test_the_seed_decides_everything(cli, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli(*TRAIN, "--epochs", 1, "--seed", seed, "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", "-1"), "lr is -1"),
        (("--distill", "0.5"), "no --weights"),
        (("--ema", "2"), "'--ema': 2.0 is not in the range"),
        (("--policy", "nothing.json"), "nothing.json"),
        (("--data", "digit", "--normalize", "unit"), "nearest: digits"),
    ],
)
def test_mistakes_end_in_one_clear_line(refused, tmp_path, options, message):
    assert message in refused(*TRAIN, "--epochs", 1, "--out", tmp_path / "run", *options)


def test_a_run_is_followed_where_trackers_say(cli, refused, tmp_path, monkeypatch):
    told = []

    class Told:
        def __init__(self, where):
            self.where = where

        def start(self, settings, records):
            told.append((self.where, settings["epochs"]))

        def epoch(self, record):
            told.append(record["epoch"])

        def finish(self):
            told.append("end")

    monkeypatch.setattr("bitscape.engine.trackers.TRACKERS", {"told": Told})
    cli(*TRAIN, "--epochs", 2, "--tracker", "told=there=1", "--out", tmp_path / "run")
    assert told == [("there=1", 2), 1, 2, "end"]
    for text in ("tol=there", "told", "told="):
        assert f"--tracker '{text}': write e.g. tensorboard=" in refused(*TRAIN, "--tracker", text, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_is_never_overwritten(refused, tmp_path):
    for name in ("checkpoint.safetensors", "model.safetensors", "policy.json", "tiers.json"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("work")
        assert f"--out {out}: it holds " in refused(*TRAIN, "--out", out)
        if name != "checkpoint.safetensors":
            assert f"it holds {name}, and no checkpoint to go on from; give another folder" in refused(*TRAIN, "--out", out, "--resume")
        assert (out / name).read_text() == "work"


def test_resume_starts_where_there_is_nothing(cli, tmp_path):
    cli(*TRAIN, "--epochs", 1, "--out", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_ctrl_c_before_training_promises_no_checkpoint(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitscape.cli.train._train", interrupt)
    shown = run_cli(*TRAIN, "--out", tmp_path / "run")
    assert (shown.code, shown.err.splitlines()[-1]) == (130, "interrupted: no result was written; run the command again")


@pytest.mark.signals
def test_ctrl_c_in_training_names_the_checkpoint_from_which_the_run_goes_on(cli, tmp_path, monkeypatch):
    calls, step = [], Plain.__call__

    def interrupt(self, *args):
        calls.append(None)
        if len(calls) == 2:  # of 6 batches
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Plain, "__call__", interrupt)
        shown = run_cli(*TRAIN, "--epochs", 1, "--out", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    word = f"interrupted: {checkpoint} is kept; run the same command with --resume to go on from it"
    assert (shown.code, shown.err.splitlines()[-1], checkpoint.is_file()) == (130, word, True)
    cli(*TRAIN, "--epochs", 1, "--out", tmp_path / "run", "--resume")
    cli(*TRAIN, "--epochs", 1, "--out", tmp_path / "whole")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_folder_that_another_thread_trains_in_is_refused(tmp_path):
    shown = []

    def attempt():
        shown.append(run_cli(*TRAIN, "--out", tmp_path / "run"))

    with locked(tmp_path / "run"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert shown[0].code == 2 and f"process {os.getpid()} on " in shown[0].err


def test_a_float_run_does_not_take_a_folder_with_a_policy(refused, tmp_path):
    for name in ("checkpoint.safetensors", "policy.json"):
        (tmp_path / name).write_text("work")
    assert "it holds policy.json, and a float network has none" in refused(*TRAIN, "--out", tmp_path, "--resume")
