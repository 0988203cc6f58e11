import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bitscape as bs
from bitscape.cost.latency import LatencyTable
from bitscape.data.batches import DIGITS
from bitscape.data.corruptions import CORRUPTIONS
from bitscape.data.proxy import draw_proxy
from bitscape.data.samples import Samples
from bitscape.data.sources import load_dataset
from bitscape.exporters.packed.file import load_packed
from bitscape.models.digits import digits_net
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, fingerprint, uniform_policy
from bitscape.report.differences import share_interval
from bitscape.report.documents import load_evaluation
from tests.cli.run import MIXED, MODEL

pytestmark = pytest.mark.slow

EVALUATE = ("evaluate", *MODEL, "--data", "digits")
CALIBRATION = ("--calibration", "digits", "--calibration-images", 64)


def _top1(shown):
    found = re.match(r"top-1 ([0-9.]+) %", shown.out)
    assert found
    return float(found.group(1))


def _accuracy(weights):
    """Top-1 of the float digits network, in percent."""
    model, digits = digits_net().eval(), load_dataset("digits", split="test")
    model.load_state_dict(load_file(weights))
    with torch.no_grad():
        same = model(DIGITS.apply(digits.images)).argmax(1) == digits.labels
    return round(100 * float(same.double().mean()), 2)


@pytest.fixture
def weights(trained):
    return ("--weights", trained / "model.safetensors")


def test_the_word_of_repair_decides_what_is_packed(cli, trained, weights, tmp_path):
    model, digits = digits_net().eval(), load_dataset("digits")
    model.load_state_dict(load_file(trained / "model.safetensors"))
    images = DIGITS.apply(draw_proxy(digits, images=64, seed=0).images)
    for word, repair in (("none", None), ("compensate", "compensate")):
        file = tmp_path / f"{word}.safetensors"
        options = ("--policy", trained / "mixed.json", *CALIBRATION, "--repair", word)
        cli("export", "packed", *MODEL, *weights, *options, "--out", file)
        expected = bs.quantize(model, MIXED, Samples.of(images), repair=repair)
        with torch.no_grad():
            assert load_packed(file, model)(images).equal(expected(images))


def test_float_then_quantized_then_packed(cli, trained, weights, tmp_path):
    float_shown = cli(*EVALUATE, *weights)
    assert _top1(float_shown) == _accuracy(trained / "model.safetensors")
    assert "473.2 k MACs" in float_shown.out
    policy = ("--policy", trained / "mixed.json", *CALIBRATION)
    quantized = _top1(cli(*EVALUATE, *weights, *policy))
    file = tmp_path / "packed.safetensors"
    exported = cli("export", "packed", *MODEL, *weights, *policy, "--out", file).out
    assert "same, bit for bit" in exported
    assert re.search(rf"file +{file.stat().st_size:,}\n", exported)
    assert _top1(cli(*EVALUATE, "--packed", file)) == quantized


def test_a_packed_file_that_reads_back_otherwise_is_not_kept(
    refused, trained, weights, tmp_path, monkeypatch
):
    def altered(*args):
        network = load_packed(*args)
        network.head.bias.add_(1)
        return network

    monkeypatch.setattr("bitscape.verbs.export.load_packed", torch.no_grad()(altered))
    file = tmp_path / "packed.safetensors"
    file.write_text("of an earlier export")
    policy = ("--policy", trained / "mixed.json", *CALIBRATION)
    message = refused("export", "packed", *MODEL, *weights, *policy, "--out", file)
    assert f"{file}: read back, its outputs differ from the network's that was saved" in message
    assert message.endswith("the file is not kept")
    assert file.read_text() == "of an earlier export"
    assert list(tmp_path.iterdir()) == [file]


def _table(path, policy, **changed):
    """Every layer takes 1 ms at 8/8, and 0.5 ms at other bits of the policy."""
    shapes = layer_shapes(digits_net())
    about = {"runtime": "r 1", "machine": "m", "threads": 1, "batch_size": 1, "input_shape": (1, 8, 8), "fingerprint": fingerprint(shapes)}
    layers = {name: {str(bits): 0.5, "8/8": 1.0} for name, bits in policy.layers.items()}
    LatencyTable(**{**about, "network_ms": 8.0, "float_ms": 9.0, "layers": layers, **changed}).save(path)
    return ("--latency", path)


def test_predicted_milliseconds_stand_beside_the_costs(cli, refused, trained, weights, tmp_path):
    policy, table = ("--policy", trained / "mixed.json", *CALIBRATION), _table(tmp_path / "table.json", MIXED)
    shown = cli(*EVALUATE, *weights, *policy, *table)
    assert re.search(r"^latency_ms +5 ms ", shown.out, re.M)  # two ends, six layers between them
    assert "latency_ms: r 1, m, threads: 1, batch: 1" in shown.out
    assert "latency_ms" not in cli(*EVALUATE, *weights, *policy).out
    assert "--latency: times are predicted at the bits of a policy" in refused(*EVALUATE, *weights, *table)
    other = _table(tmp_path / "other.json", MIXED, input_shape=(1, 9, 9))
    assert "images of 1x9x9, and these have 1x8x8" in refused(*EVALUATE, *weights, *policy, *other)
    eight = _table(tmp_path / "eight.json", MIXED, layers={name: {"8/8": 1.0} for name in MIXED.layers})
    assert "only at 8/8" in refused(*EVALUATE, *weights, *policy, *eight)


def test_a_repaired_network_packs_with_its_norms_folded(cli, trained, weights, tmp_path):
    policy = ("--policy", trained / "mixed.json", *CALIBRATION)
    file = tmp_path / "repaired.safetensors"
    repaired = _top1(cli(*EVALUATE, *weights, *policy))
    cli("export", "packed", *MODEL, *weights, *policy, "--out", file)
    assert _top1(cli(*EVALUATE, "--packed", file)) == repaired


def test_a_trained_folder_packs(cli, refused, trained, weights, tmp_path):
    run, file = tmp_path / "run", tmp_path / "packed.safetensors"
    cli("train", *MODEL, *weights, "--data", "digits", "--policy", trained / "mixed.json", "--epochs", 1, "--out", run)
    cli("export", "packed", *MODEL, "--checkpoint", run, "--out", file)
    assert _top1(cli(*EVALUATE, "--packed", file)) == _top1(cli(*EVALUATE, "--checkpoint", run))
    assert _top1(cli(*EVALUATE, "--checkpoint", trained)) == _top1(cli(*EVALUATE, *weights))
    message = refused("export", "packed", *MODEL, "--checkpoint", trained, "--out", tmp_path / "no.safetensors")
    assert "holds a float network" in message


NETWORKS = """
import torch
from torch import nn
from bitscape.engine import Spent

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

class Adaptive(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 10)

    def forward(self, x):
        bits = 2.0 + (x.mean((1, 2, 3)) > 0.5)  # the digits are darker; severity 5 of brightness lifts all of them by 0.3
        self.spent = Spent(bits=bits, bitops=bits)
        return self.head(x.flatten(1))
"""


@pytest.fixture
def networks(tmp_path):
    file = tmp_path / "networks.py"
    file.write_text(NETWORKS)
    return lambda name: ("--model", f"{file}:{name}", "--device", "cpu")


def test_a_network_that_fails_on_an_image_of_zeros_packs_with_its_norms_folded(cli, networks, tmp_path):
    file, policy = tmp_path / "packed.safetensors", tmp_path / "policy.json"
    uniform_policy(["conv", "head"], LayerBits(8, 8)).save(policy)
    options = (*networks("Standardized"), "--policy", policy, *CALIBRATION)
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
    repaired = ("--policy", policy, *CALIBRATION)
    calibrated = (*repaired, "--repair", "none")
    cli("export", "packed", *own, *repaired, "--out", packed)
    large = ("--input-size", 16)
    for options in ((), calibrated, repaired, ("--packed", packed)):
        message = refused("evaluate", *own, *data, *large, *options)
        assert "1, 16, 16)" in message and "cannot be multiplied (" in message and "; check channels, size" in message
    for options in ((), ("--policy", policy)):
        assert "1, 16, 16)" in refused("train", *own, *data, *large, *options, "--epochs", 1, "--out", run)
    assert "1, 16, 16)" in refused("export", "packed", *own, *repaired, *large, "--out", tmp_path / "other.safetensors")
    assert "to have 3 channels, but got 1 channels" in refused("evaluate", *networks("colour"), *data)
    assert "to have 3 channels, but got 1 channels" in refused("train", *networks("colour"), *data, "--out", run)


@pytest.fixture
def colored(tmp_path):
    """30 digits in three channels."""
    file, digits = tmp_path / "colored.npz", load_dataset("digits", split="test", limit=30)
    np.savez(file, images=digits.images.repeat(1, 3, 1, 1).numpy(), labels=digits.labels.numpy(), class_names=list("0123456789"))
    return ("--data", file, "--normalize", "unit")


def test_corruptions_print_a_table_and_draw_the_heat_map(cli, networks, colored, tmp_path):
    file = tmp_path / "map.svg"
    plain = cli("evaluate", *networks("colour"), *colored)
    shown = cli("evaluate", *networks("colour"), *colored, "--corruptions", file)
    assert shown.out.startswith(plain.out)
    rows = {words[0]: words[1:] for line in shown.out[len(plain.out) :].splitlines() if (words := line.split())}
    assert rows["clean"] == [f"{_top1(plain):.2f}"]
    assert set(CORRUPTIONS) < set(rows) and "bits" not in shown.out
    for name in CORRUPTIONS:
        *values, mean = map(float, rows[name])
        assert len(values) == 5 and mean == pytest.approx(sum(values) / 5, abs=0.01)
    svg = ElementTree.parse(file).getroot()
    drawn = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{float(rows['jpeg'][3]):.1f}" in drawn
    assert f"heat map: {file}" in shown.out


def test_a_network_that_reports_its_bits_gets_a_second_table(cli, networks, colored, tmp_path):
    shown = cli("evaluate", *networks("Adaptive"), *colored, "--corruptions", tmp_path / "map.svg")
    _, _, bits = shown.out.partition("mean activation bits at severity")
    rows = {words[0]: words[1:] for line in bits.splitlines() if (words := line.split())}
    assert rows["clean"] == ["2.00"]
    assert rows["contrast"] == ["2.00"] * 6
    assert (rows["brightness"][0], rows["brightness"][4]) == ("2.00", "3.00")


def test_corruptions_that_cannot_be_drawn_are_refused_before_any_work(refused, networks, colored, tmp_path):
    asked = ("evaluate", *networks("colour"), *colored, "--corruptions")
    assert "--corruptions '" in (message := refused(*asked, tmp_path / "map.png")) and "written as .svg; give e.g. map.svg" in message
    assert "no folder" in refused(*asked, tmp_path / "none" / "map.svg")
    assert "three channels; --data 'digits' has 1" in refused(*EVALUATE, "--corruptions", tmp_path / "map.svg")


def test_mistakes_end_in_one_clear_line(refused, trained, weights, tmp_path):
    policy = ("--policy", trained / "mixed.json")
    assert "go together" in refused(*EVALUATE, *weights, *policy)
    assert "at most one" in refused(*EVALUATE, *policy, "--checkpoint", trained)
    assert "no packed file" in refused(*EVALUATE, "--packed", trained / "model.safetensors")
    assert "not a complete safetensors" in refused(*EVALUATE, "--packed", trained / "mixed.json")
    assert "exactly one of them" in refused("export", "packed", *MODEL, "--out", tmp_path / "p.safetensors")
    other = tmp_path / "other.json"
    uniform_policy(["conv1"], LayerBits(4, 4)).save(other)
    assert "no layer 'conv1'" in refused(*EVALUATE, "--policy", other, *CALIBRATION)
    unused = refused("train", *MODEL, "--data", "digits", "--repair", "none", "--out", tmp_path)
    assert "--repair: a network is repaired when a --policy quantizes it; add --policy" in unused
    assert unused == refused(*EVALUATE, "--repair", "tune", "--checkpoint", trained)
    folder = refused(*EVALUATE, *policy, *CALIBRATION, "--repair-folder", tmp_path)
    assert "repair='compensate' keeps nothing there" in folder


def test_figures_go_into_a_file_that_the_report_reads(cli, trained, weights, tmp_path):
    files = [tmp_path / "float.json", tmp_path / "mixed-figures.json"]
    cli(*EVALUATE, *weights, "--json", files[0])
    shown = cli(*EVALUATE, *weights, "--policy", trained / "mixed.json", *CALIBRATION, "--json", files[1])
    in_float, mixed = (load_evaluation(file) for file in files)
    assert round(in_float.value, 2) == _accuracy(trained / "model.safetensors") and round(mixed.value, 2) == _top1(shown)
    assert (in_float.evaluated, mixed.evaluated, mixed.samples) == ("float", "mixed.json", len(load_dataset("digits", split="test")))
    assert mixed.interval == share_interval(mixed.value, mixed.samples)
    assert (in_float.method, in_float.bits) == (None, {})
    layers = Policy.load(trained / "mixed.json").layers
    assert mixed.bits == {name: str(bits) for name, bits in layers.items()}
    assert in_float.cost["macs"] == 473_216 and mixed.cost["weight_bytes"] < in_float.cost["parameter_bytes"]
    page = tmp_path / "report.html"
    cli("report", *files, trained / "mixed.json", "--out", page)
    assert "Measured on digits, top-1 %" in page.read_text()
