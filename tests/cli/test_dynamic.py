import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitscape.data.batches import UNIT
from bitscape.data.corruptions import randomly_corrupted
from bitscape.data.proxy import draw_proxy
from bitscape.data.sources import load_dataset
from bitscape.dynamic import dynamic_network
from bitscape.dynamic.dqmq import DqmqStep
from bitscape.engine.describe import describe
from bitscape.policy import LayerBits, Policy
from tests.cli.run import MODEL, run_cli, succeed

pytestmark = pytest.mark.slow

NETWORK = """
from torch import nn

def block(inputs, outputs, stride):
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

def small():
    body = [*block(3, 8, 1), *block(8, 16, 2), *block(16, 16, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
"""
POLICY = Policy({"0": LayerBits(8, 8), "3": LayerBits(4, 8), "6": LayerBits(4, 8), "11": LayerBits(8, 8)})
CONV3, CONV6 = 16 * 16 * 8 * 9, 16 * 16 * 16 * 9
"""MACs of the two dynamic layers, at 4x4 outputs."""
STATIC_BITOPS = 64 * (64 * 8 * 3 * 9 + 64 * 10)
HEADS_BITOPS = 64 * (9 * 3 * 64 + 2 * 16 * (8 + 16) + 2 * 2 * 6)
"""Image features; 16 positions of each layer's input, twice; two heads of six features and two outputs. At 8 bits."""


@dataclass(frozen=True)
class Given:
    """Files for the commands, and the options that name them."""

    folder: Path

    @property
    def model(self) -> tuple[object, ...]:
        return ("--model", f"{self.folder / 'network.py'}:small", "--device", "cpu", "--normalize", "unit")

    @property
    def train(self) -> tuple[object, ...]:
        data = ("--data", self.folder / "train.npz", "--policy", self.folder / "w4.json")
        return ("train", *self.model, *data, "--epochs", 2, "--batch-size", 32, "--lr", 0.05)

    @property
    def dynamic(self) -> tuple[object, ...]:
        return (*self.train, "--dynamic", "2-8", "--budget", "bitops=w4a4", "--head-lr", 5)

    def evaluate(self, checkpoint: Path, *options: object, data: str = "train") -> str:
        return succeed("evaluate", *self.model, "--data", self.folder / f"{data}.npz", "--checkpoint", checkpoint, *options).out


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    (folder / "network.py").write_text(NETWORK)
    POLICY.save(folder / "w4.json")
    for name, images in (("train", 160), ("test", 40)):
        digits = load_dataset("digits", split=name, limit=images)
        arrays = {"images": digits.images.repeat(1, 3, 1, 1).numpy(), "labels": digits.labels.numpy()}
        np.savez(folder / f"{name}.npz", **arrays, class_names=list("0123456789"))
    return Given(folder)


@pytest.fixture(scope="module")
def run(given):
    """The folder of a dynamic run, and what training printed."""
    folder = given.folder / "run"
    return folder, succeed(*given.dynamic, "--out", folder).out


@pytest.fixture(scope="module")
def tiers(given, run):
    """The folder of its tiers, and what making them printed."""
    folder, parted = given.folder / "tiers", given.folder / "parted"
    shutil.copytree(run[0], parted)
    state = load_file(parted / "model.safetensors")
    for head in (0, 1):  # a short training leaves images almost alike: let contrast, the third feature, part them
        state[f"heads.{head}.linear.weight"][0] = torch.tensor([0.0, 0, 2, 0, 0, 0])
        state[f"heads.{head}.linear.bias"][0] = 5
    state["shift"].zero_()
    save_file(state, parted / "model.safetensors")
    data = ("--data", given.folder / "train.npz", "--checkpoint", parted)
    return folder, succeed("tiers", *given.model, *data, "--count", 2, "--out", folder).out


def _row(text: str, name: str) -> list[str]:
    """Columns of the first line that starts with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return re.split(r"\s{2,}", line)


def _millions(text: str) -> float:
    value, _, prefix = text.partition(" ")
    return float(value) * {"": 1e-6, "k": 1e-3, "M": 1.0}[prefix]


def test_training_tells_the_bits_of_each_epoch_and_meets_the_budget(run):
    folder, out = run
    assert {path.name for path in folder.iterdir()} >= {"dynamic.json", "policy.json", "model.safetensors", "metrics.jsonl", "run.json"}
    assert re.split(r"\s{2,}", out.splitlines()[0]) == ["epoch", "loss", "top-1 %", "activation bits", "BitOps", "images/s"]
    found = re.search(r"160 training images cost (.*) BitOps on average, the budget is (.*)\n", out)
    assert found
    budget = STATIC_BITOPS + 16 * (CONV3 + CONV6)
    assert _millions(found[2]) == pytest.approx(budget / 1e6, rel=1e-3)
    assert 0.8 * budget / 1e6 < _millions(found[1]) <= _millions(found[2])
    assert f"bitscape tiers --checkpoint {folder}" in out and f"bitscape evaluate --checkpoint {folder}" in out
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["step"]["kind"] == "Dqmq" and settings["step"]["bitops"] == budget
    assert (settings["optimizer"]["sgd"]["lr"], settings["optimizer"]["head_lr"]) == (0.05, 5.0)
    assert Policy.load(folder / "policy.json").layers == POLICY.layers


def test_evaluation_tells_what_images_cost(given, run):
    out = given.evaluate(run[0])
    name, mean, least, most, eight, _ = _row(out, "bitops")
    assert f"cost {mean} BitOps on average" in run[1]  # of the same images
    assert _millions(least) <= _millions(mean) <= _millions(most)
    assert (name, _millions(eight)) == ("bitops", pytest.approx((STATIC_BITOPS + 64 * (CONV3 + CONV6)) / 1e6, rel=1e-3))
    share = re.search(r"deciding on the bits takes ([0-9.]+) % of these BitOps", out)
    assert share and float(share[1]) == pytest.approx(100 * HEADS_BITOPS / 1e6 / _millions(mean), abs=0.02)
    bits = [float(value) for value in _row(out, "mean_activation_bits")[1:4]]
    assert 2 < bits[1] <= bits[0] <= bits[2] <= 8


def test_decisions_for_whole_batches(given, run):
    alone = given.evaluate(run[0], "--decisions", "per-batch", "--batch-size", 1, data="test")
    assert alone == given.evaluate(run[0], "--batch-size", 1, data="test")
    together = given.evaluate(run[0], "--decisions", "per-batch", "--batch-size", 160)
    _, mean, least, most, *_ = _row(together, "bitops")
    assert mean == least == most


def test_tiers_share_the_images_and_evaluate_as_they_were_made(given, tiers):
    folder, made = tiers
    out = given.evaluate(folder)
    first, second = _row(made, "tier1"), _row(made, "tier2")
    assert (_row(out, "tier1"), _row(out, "tier2")) == (first, second)
    shares = [float(row[-1].removesuffix(" %")) for row in (first, second)]
    assert sum(shares) == pytest.approx(100, abs=0.11) and min(shares) > 0
    assert f"160 images cost {_row(out, 'bitops')[1]} BitOps on average" in made
    gate = 64 * (9 * 3 * 64 + 2 * 3)
    mean = sum(share * _millions(row[3]) for share, row in zip(shares, (first, second), strict=True)) / 100 + gate / 1e6
    assert _millions(_row(out, "bitops")[1]) == pytest.approx(mean, rel=2e-3)


def test_a_tier_evaluates_and_packs_as_any_static_network(given, tiers, tmp_path):
    own, packed = tiers[0] / "tier1", tmp_path / "tier1.safetensors"
    shown = given.evaluate(own)
    assert _row(shown, "bitops")[1] == _row(tiers[1], "tier1")[3]
    model = given.model[:-2]
    succeed("export", "packed", *model, "--checkpoint", own, "--out", packed)
    read = succeed("evaluate", *given.model, "--data", given.folder / "train.npz", "--packed", packed).out
    assert read.splitlines()[0] == shown.splitlines()[0]


@pytest.mark.parametrize("kind", ["run", "tiers"])
def test_corruptions_show_the_bits(given, kind, request, tmp_path):
    folder, _ = request.getfixturevalue(kind)
    out = given.evaluate(folder, "--corruptions", tmp_path / "map.svg", data="test")
    _, _, bits = out.partition("mean activation bits at severity")
    assert float(_row(bits, "clean")[1]) == pytest.approx(float(_row(out, "mean_activation_bits")[1]), abs=0.006)
    assert len(_row(bits, "shot_noise")) == 7
    assert (tmp_path / "map.svg").is_file()


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(given, run, refused, tmp_path, monkeypatch):
    calls, step = [], DqmqStep.__call__

    def interrupt(self, *args):
        calls.append(None)
        if len(calls) == 7:  # in the second epoch of 5 batches
            raise KeyboardInterrupt
        return step(self, *args)

    again = (*given.dynamic, "--out", tmp_path / "broken")
    with monkeypatch.context() as patched:
        patched.setattr(DqmqStep, "__call__", interrupt)
        assert run_cli(*again).code == 130
    data = ("--data", given.folder / "train.npz", "--checkpoint", tmp_path / "broken")
    assert "no model.safetensors; train to the end" in refused("evaluate", *given.model, *data)
    succeed(*again, "--resume")
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (run[0] / "model.safetensors").read_bytes()


def test_a_run_of_other_widths_is_told_which(given, run, refused, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    again = (*given.dynamic, "--out", tmp_path / "run", "--resume")
    line = refused(*again, "--dynamic", "1-7")  # as many scales
    for name in ("model.3", "model.6"):
        assert f"bits.{name}.activation was [2, 3, 4, 5, 6, 7, 8] and is [1, 2, 3, 4, 5, 6, 7]" in line
    assert line.endswith("pass those settings, or start over in another folder")
    Policy({**POLICY.layers, "3": LayerBits(3, 8)}).save(tmp_path / "w3.json")
    assert "bits.model.3.weight was 4 and is 3" in refused(*again, "--policy", tmp_path / "w3.json")


def _datasets(folder: Path) -> list[dict[str, object]]:
    settings = json.loads((folder / "run.json").read_text())["settings"]
    return [settings[part]["dataset"]["images"] for part in ("batches", "validation")]


def test_mixed_quality_is_for_training_images_alone_static_or_dynamic(given, tmp_path, monkeypatch):
    plain = [load_dataset(str(given.folder / f"{name}.npz")) for name in ("train", "test")]
    mixed, _ = randomly_corrupted(plain[0], seed=3)
    extra = ("--mixed-quality", "--seed", 3, "--epochs", 1, "--validation", given.folder / "test.npz")
    expected = [describe(mixed.images), describe(plain[1].images)]
    succeed(*given.train, *extra, "--out", tmp_path / "static")
    assert _datasets(tmp_path / "static") == expected
    seen = []

    def noted(model, policy, images, bits):
        seen.append(images)
        return dynamic_network(model, policy, images, bits)

    monkeypatch.setattr("bitscape.dynamic.dynamic_network", noted)
    roomy = ["bitops=2.4M" if word == "bitops=w4a4" else word for word in given.dynamic]  # whatever an epoch teaches fits
    succeed(*roomy, *extra, "--out", tmp_path / "dynamic")
    assert _datasets(tmp_path / "dynamic") == expected
    assert torch.equal(seen[0], UNIT.apply(draw_proxy(mixed, images=160, seed=3).images))


def test_weight_bits_of_each_image(given, tmp_path):
    run, options = tmp_path / "run", ("--dynamic-weights", "--epochs", 1, "--dynamic", "3-5")
    succeed(*given.dynamic, *options, "--out", run)
    about = json.loads((run / "dynamic.json").read_text())
    assert (about["low"], about["high"], about["weights"]) == (3, 5, True)
    _, mean, least, most, *_ = _row(given.evaluate(run), "bitops")
    ends = [(STATIC_BITOPS + HEADS_BITOPS + bits * bits * (CONV3 + CONV6)) / 1e6 for bits in (3, 5)]
    assert 0.99 * ends[0] < _millions(least) <= _millions(mean) <= _millions(most) < 1.01 * ends[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--step", "saq"), "--step saq does not fit --dynamic: its step is dqmq; leave --step out"),
        (("--optimizer", "adamw"), "--optimizer adamw does not fit --dynamic: it trains by SGD"),
        (("--compile",), "--compile does not fit --dynamic"),
        (("--ema", "0.9"), "--ema 0.9 does not fit --dynamic"),
        (("--dynamic", "8-2"), "--dynamic '8-2': write the least and the largest width, from 1 to 8 bits, e.g. 2-8"),
        (("--set", "bitops=1e6"), "--set bitops=1e6: what an image may cost is given by --budget"),
        (("--set", "budgetof=image"), "dqmq has no field 'budgetof'; nearest: budget_of"),
        (("--set", "warm_up=0.9"), "must not exceed 1, nor hard_from hard_until"),
        (("--budget", "weight_bytes=1kB"), "--budget 'weight_bytes=1kB': bits that images decide are held to BitOps alone"),
        (("--budget", "bitops=w4"), "does not say the activation bits"),
        (("--budget", "bitops=1k"), "--budget 'bitops=1k' is 1 k BitOps; with these weights an image costs"),
        (("--budget", "bitops=1e9"), "give a budget in between"),
        (("--head-lr", "-1"), "--head-lr"),
    ],
)
def test_what_does_not_fit_bits_of_each_image_is_refused(given, refused, tmp_path, options, message):
    assert message in refused(*given.dynamic, *options, "--out", tmp_path / "run")


def test_options_that_belong_together(given, refused, tmp_path):
    static, out = given.train, ("--out", tmp_path / "run")
    assert "add --budget bitops=w4a4;" in refused(*static, "--dynamic", "2-8", *out)
    without = static[: static.index("--policy")]
    assert "add --policy FILE and --budget bitops=w4a4;" in refused(*without, "--dynamic", "2-8", *out)
    own = ("--budget", "bitops=w4a4", "--dynamic-weights", "--head-lr", 1, "--step", "dqmq")
    message = refused(*static, *own, *out)
    assert "--budget, --dynamic-weights, --head-lr, --step dqmq: only for bits that images decide; add --dynamic" in message
    digits = ("train", *MODEL, "--data", "digits", "--mixed-quality", *out)
    assert "--mixed-quality needs images of three channels; --data 'digits' has 1" in refused(*digits)


def test_folders_of_another_kind_are_told_apart(given, refused, run, tiers, tmp_path):
    data = ("--data", given.folder / "train.npz")
    evaluate, out = ("evaluate", *given.model, *data), ("--out", tmp_path / "out.safetensors")
    packed = ("export", "packed", *given.model[:-2], *out, "--checkpoint")
    assert "bitscape tiers --checkpoint" in refused(*packed, run[0])
    assert f"name one of them, e.g. {tiers[0] / 'tier1'}" in refused(*packed, tiers[0])
    for folder in (run[0], tiers[0]):
        message = refused(*evaluate, "--checkpoint", folder, "--input-size", 6)
        assert "was made for images of 3x8x8, --data has 3x6x6" in message
    for options in ((), ("--checkpoint", tiers[0])):
        assert "--decisions per-batch: the network does not decide" in refused(*evaluate, *options, "--decisions", "per-batch")
    make = ("tiers", *given.model, *data, "--checkpoint")
    assert "it holds tiers.json, gate.safetensors; give another folder" in refused(*make, run[0], "--out", tiers[0])
    assert "its bits do not depend on the image" in refused(*make, tiers[0] / "tier1", "--out", tmp_path / "tiers")
