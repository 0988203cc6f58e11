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
