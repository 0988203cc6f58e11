import re

import pytest

from bitscape.policy import LayerBits, uniform_policy
from tests.cli.run import MODEL

EVALUATE = ("evaluate", *MODEL, "--data", "digits")
CALIBRATION = ("--calibration", "digits", "--calibration-images", 64)


def _top1(shown):
    found = re.match(r"top-1 ([0-9.]+) %", shown.out)
    assert found
    return float(found.group(1))


@pytest.fixture
def weights(trained):
    return ("--weights", trained / "model.safetensors")


def test_float_then_quantized_then_packed(cli, trained, weights, tmp_path):
    float_shown = cli(*EVALUATE, *weights)
    assert _top1(float_shown) > 90
    assert "473.2 k MACs" in float_shown.out
    policy = ("--policy", trained / "found.json", *CALIBRATION)
    quantized = _top1(cli(*EVALUATE, *weights, *policy))
    assert quantized > 60
    file = tmp_path / "packed.safetensors"
    exported = cli("export", "packed", *MODEL, *weights, *policy, "--out", file).out
    assert "same, bit for bit" in exported
    assert re.search(rf"file +{file.stat().st_size:,}\n", exported)
    assert _top1(cli(*EVALUATE, "--packed", file)) == quantized


def test_a_repaired_network_packs_with_its_norms_folded(cli, trained, weights, tmp_path):
    policy = ("--policy", trained / "found.json", *CALIBRATION, "--repair")
    file = tmp_path / "repaired.safetensors"
    repaired = _top1(cli(*EVALUATE, *weights, *policy))
    cli("export", "packed", *MODEL, *weights, *policy, "--out", file)
    assert repaired > 90
    assert _top1(cli(*EVALUATE, "--packed", file)) == repaired


def test_a_trained_folder_packs(cli, refused, trained, weights, tmp_path):
    run, file = tmp_path / "run", tmp_path / "packed.safetensors"
    cli("train", *MODEL, *weights, "--data", "digits", "--policy", trained / "found.json", "--epochs", 1, "--out", run)
    cli("export", "packed", *MODEL, "--checkpoint", run, "--out", file)
    assert _top1(cli(*EVALUATE, "--packed", file)) == _top1(cli(*EVALUATE, "--checkpoint", run))
    assert _top1(cli(*EVALUATE, "--checkpoint", trained)) == _top1(cli(*EVALUATE, *weights))
    message = refused("export", "packed", *MODEL, "--checkpoint", trained, "--out", tmp_path / "no.safetensors")
    assert "holds a float network" in message


NETWORKS = """
import torch
from torch import nn

class Standardized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 10)

    def forward(self, x):
        x = x / x.std(dim=(1, 2, 3), keepdim=True)
        return self.head(self.norm(self.conv(x)).flatten(1))

class Broken(Standardized):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.conv.weight[0] = float("nan")

def colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
"""


@pytest.fixture
def networks(tmp_path):
    file = tmp_path / "networks.py"
    file.write_text(NETWORKS)
    return lambda name: ("--model", f"{file}:{name}", "--device", "cpu")


def test_a_network_that_fails_on_an_image_of_zeros_packs_with_its_norms_folded(cli, networks, tmp_path):
    file, policy = tmp_path / "packed.safetensors", tmp_path / "policy.json"
    uniform_policy(["conv", "head"], LayerBits(8, 8)).save(policy)
    options = (*networks("Standardized"), "--policy", policy, *CALIBRATION, "--repair")
    assert "same, bit for bit" in cli("export", "packed", *options, "--out", file).out
    data = ("--data", "digits", "--split", "test")
    read_back = cli("evaluate", *networks("Standardized"), *data, "--packed", file)
    assert _top1(read_back) == _top1(cli("evaluate", *options, *data))


def test_a_network_with_nan_is_refused(refused, networks):
    assert "1 weight tensors are not finite, first conv.weight" in refused("evaluate", *networks("Broken"), "--data", "digits")


def test_images_of_another_size_or_channels_end_in_one_clear_line(cli, refused, networks, tmp_path):
    policy, packed, run = tmp_path / "policy.json", tmp_path / "packed.safetensors", tmp_path / "run"
    uniform_policy(["conv", "head"], LayerBits(8, 8)).save(policy)
    own, data = networks("Standardized"), ("--data", "digits")
    repaired = ("--policy", policy, *CALIBRATION, "--repair")
    cli("export", "packed", *own, *repaired, "--out", packed)
    large = ("--input-size", 16)
    for options in ((), ("--policy", policy, *CALIBRATION), repaired, ("--packed", packed)):
        message = refused("evaluate", *own, *data, *large, *options)
        assert "1, 16, 16)" in message and "cannot be multiplied (" in message and "; check channels, size" in message
    for options in ((), ("--policy", policy)):
        assert "1, 16, 16)" in refused("train", *own, *data, *large, *options, "--epochs", 1, "--out", run)
    assert "1, 16, 16)" in refused("export", "packed", *own, *repaired, *large, "--out", tmp_path / "other.safetensors")
    assert "to have 3 channels, but got 1 channels" in refused("evaluate", *networks("colour"), *data)
    assert "to have 3 channels, but got 1 channels" in refused("train", *networks("colour"), *data, "--out", run)


def test_mistakes_end_in_one_clear_line(refused, trained, weights, tmp_path):
    policy = ("--policy", trained / "found.json")
    assert "go together" in refused(*EVALUATE, *weights, *policy)
    assert "at most one" in refused(*EVALUATE, *policy, "--checkpoint", trained)
    assert "no packed one" in refused(*EVALUATE, "--packed", trained / "model.safetensors")
    assert "not a complete safetensors" in refused(*EVALUATE, "--packed", trained / "found.json")
    assert "exactly one of the two" in refused("export", "packed", *MODEL, "--out", tmp_path / "p.safetensors")
    other = tmp_path / "other.json"
    uniform_policy(["conv1"], LayerBits(4, 4)).save(other)
    assert "no layer 'conv1'" in refused(*EVALUATE, "--policy", other, *CALIBRATION)
