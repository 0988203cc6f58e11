import json
import re

import numpy as np
import pytest

from bitscape.cost.latency import LatencyTable
from bitscape.cost.targets import TARGETS
from bitscape.models.digits import digits_net
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, fingerprint
from bitscape.searches.fisher import Fisher
from bitscape.searches.scores import ScoreTable
from tests.cli.run import MODEL, run_cli

pytestmark = pytest.mark.slow

SEARCH = ("search", *MODEL, "--data", "digits", "--images", 16)


def test_writes_a_policy_that_says_where_it_comes_from(cli, trained, tmp_path):
    policy_file, scores = tmp_path / "policy.json", tmp_path / "scores.json"
    budgets = ("--budget", "bitops=w4a4", "--budget", "weight_bytes=15kB")
    cli(*SEARCH, "--weights", trained / "model.safetensors", *budgets, "--out", policy_file, "--scores", scores)
    policy = Policy.load(policy_file)
    provenance = policy.provenance
    assert provenance["method"] == "fisher"
    assert provenance["images"] == [16, 1, 8, 8]
    assert provenance["model"] == MODEL[1]
    assert provenance["weights"] == "model.safetensors"
    assert policy.layers["stem.0"] == policy.layers["head"] == LayerBits(8, 8)
    assert policy.cost["weight_bytes"] <= 15000
    assert ScoreTable.load(scores).method == "fisher"


def test_prints_layers_costs_and_use_of_the_budget(cli):
    shown = cli(*SEARCH, "--budget", "bitops=0.25x", "--method", "uniform")
    assert "block2.conv1  Conv2d" in shown.out
    assert "of 8 bit" in shown.out
    assert "used" in shown.out


VIEWED = """import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 10)

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        return self.head(self.conv(self.stem(x)).view(len(x), -1))
"""


def test_a_network_that_does_not_take_channels_last_needs_no_option(cli, refused, tmp_path):
    (tmp_path / "viewed.py").write_text(VIEWED)
    network = ("--model", f"{tmp_path / 'viewed.py'}:Net", "--data", "digits")
    search = ("search", *network, "--images", 16, "--budget", "bitops=w4a4", "--pin", "none", "--method", "local")
    cli(*search, "--out", tmp_path / "chosen.json")
    cli(*search, "--no-channels-last", "--out", tmp_path / "contiguous.json")
    chosen, contiguous = (Policy.load(tmp_path / f"{name}.json") for name in ("chosen", "contiguous"))
    assert chosen.layers == contiguous.layers
    train = ("train", *network, "--epochs", 1, "--out", tmp_path / "run")
    for command in (search, train, ("evaluate", *network)):
        message = refused(*command, "--channels-last")
        assert "channels_last: True, but the network does not take that memory format: view size" in message
    cli(*train)
    cli("evaluate", *network, "--checkpoint", tmp_path / "run")


def test_candidates_settings_and_pins_reach_the_search(cli, tmp_path):
    options = ("--candidates", "w=2,4;a=8", "--set", "images=8", "--pin", "down.0=6/8", "--pin", "none", "--for-training")
    cli(*SEARCH, "--budget", "mean_weight_bits=3", *options, "--out", tmp_path / "p.json")
    policy = Policy.load(tmp_path / "p.json")
    assert policy.provenance["settings"]["images"] == 8
    assert policy.provenance["for_training"] is True
    assert policy.layers["down.0"] == LayerBits(6, 8)
    assert {bits for name, bits in policy.layers.items() if name != "down.0"} <= {LayerBits(2, 8), LayerBits(4, 8)}


def test_a_pin_leaves_the_ends_at_8_bits(cli, tmp_path):
    cli(*SEARCH, "--method", "uniform", "--budget", "bitops=w4a4", "--pin", "down.0=2/2", "--out", tmp_path / "p.json")
    layers = Policy.load(tmp_path / "p.json").layers
    assert (layers["stem.0"], layers["down.0"], layers["head"]) == (LayerBits(8, 8), LayerBits(2, 2), LayerBits(8, 8))


def test_scores_solve_every_budget_as_a_search_does(cli, trained, tmp_path):
    budget, scores = ("--budget", "bitops=w3a3"), ("--scores", tmp_path / "scores.json")
    cli(*SEARCH, "--weights", trained / "model.safetensors", *budget, *scores, "--out", tmp_path / "searched.json")
    solve = ("solve", *MODEL, *scores, "--input-shape", "1x8x8")
    cli(*solve, *budget, "--out", tmp_path / "solved.json")
    searched, solved = (Policy.load(tmp_path / f"{name}.json") for name in ("searched", "solved"))
    assert solved.layers == searched.layers
    assert solved.fingerprint == searched.fingerprint


def test_prints_a_front_whose_costs_are_budgets(cli, trained, tmp_path):
    solve = ("solve", *MODEL, "--scores", trained / "scores.json", "--input-shape", "1x8x8")
    rows = [line.split() for line in cli(*solve, "--front", 5).out.splitlines()[1:] if line and line[0] == " "]
    costs = [int(row[0]) for row in rows]
    assert len(rows) >= 3
    assert costs == sorted(costs)
    cli(*solve, "--budget", f"bitops={costs[0]}", "--out", tmp_path / "cheapest.json")
    assert Policy.load(tmp_path / "cheapest.json").cost["bitops"] == costs[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--budget is missing"),
        (("--budget", "bitops=1000"), r"no policy fits bitops=1000.0 \(feasible from 2484224"),
        (("--budget", "bitop=0.5x"), "nearest: bitops"),
        (("--budget", "bitops=0.5x", "--pin", "block1.conv=8/8"), "no layer 'block1.conv'; nearest: block1.conv"),
        (("--budget", "bitops=0.5x", "--method", "fischer"), "nearest: fisher"),
        (("--budget", "bitops=0.5x", "--set", "imags=4"), "nearest: images"),
        (("--budget", "bitops=0.5x", "--normalize", "imagenet"), "1 channels, the normalization has 3"),
        (("--budget", "bitops=0.5x", "--weights", "no-file.safetensors"), "no-file.safetensors"),
        (("--budget", "bitops=0.5x", "--out", "no/folder/p.json"), "no folder 'no/folder'"),
        (("--budget", "bitops=0.5x", "--method", "uniform", "--scores", "s.json"), "uniform has no scores"),
        (("--budget", "bitops=0.5x", "--folder", "run"), "folder='run': fisher does not train"),
        (("--budget", "bitops=0.5x", "--method", "uniform", "--pick", "least-sharp"), "pick='least-sharp': uniform has no scores"),
        (("--budget", "bitops=0.5x", "--images", "9999"), "allows 1 to 1437"),
        (("--budget", "bitops=0.5x", "--device", "gpu"), "--device 'gpu' cannot be used"),
        (("--budget", "bitops=0.5x", "--device", "meta"), "--device 'meta' cannot be used"),
    ],
)
def test_mistakes_end_in_one_clear_line(refused, options, message):
    assert re.search(message, refused(*SEARCH, *options))


def test_a_budget_that_nothing_fits_is_refused_before_scoring(refused, monkeypatch):
    monkeypatch.setattr(Fisher, "search", lambda *_, **__: pytest.fail("scored"))
    assert "feasible from" in refused(*SEARCH, "--budget", "weight_bytes=1kB", "--set", "images=8")


def test_a_wrong_image_size_is_told_with_the_shape(refused, tmp_path):
    network = tmp_path / "fixed.py"
    network.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(100, 10))\n")
    line = refused("search", "--model", f"{network}:net", "--data", "digits", "--images", 8, "--budget", "bitops=0.5x")
    assert "the network fails on a batch of shape (2, 1, 8, 8)" in line


def test_unknown_networks_and_images_are_told(refused):
    assert "digits_nett" in refused("search", "--model", MODEL[1] + "t", "--data", "digits", "--budget", "bitops=0.5x")
    assert "nearest: digits" in refused("search", *MODEL, "--data", "digit", "--budget", "bitops=0.5x", "--normalize", "unit")


def test_solving_says_what_it_needs(refused, trained):
    solve = ("solve", *MODEL, "--scores", trained / "scores.json")
    assert "--input-shape is missing" in refused(*solve, "--budget", "bitops=w4a4")
    assert "exactly one of the two" in refused(*solve, "--input-shape", "1x8x8")
    shape = ("--input-shape", "1x8x8")
    assert "10000 is not in the range 2<=x<=1000" in refused(*solve, *shape, "--front", 10_000)
    assert "a front is many policies" in refused(*solve, *shape, "--front", 4, "--out", "p.json")
    assert "score it, or pin it" in refused(*solve, *shape, "--pin", "none", "--budget", "bitops=w4a4")
    assert "unknown entry 'tool'" in refused("solve", *MODEL, "--scores", trained / "mixed.json", *shape, "--front", 4)


def test_the_search_is_the_same_every_time(cli, trained, tmp_path):
    files = [tmp_path / f"{at}.json" for at in range(2)]
    for file in files:
        weights = ("--weights", trained / "model.safetensors")
        cli(*SEARCH, *weights, "--budget", "bitops=0.3x", "--seed", 3, "--out", file)
    assert files[0].read_text() == files[1].read_text()
    assert json.loads(files[0].read_text())["provenance"]["seed"] == 3


TRAINING = ("--method", "differentiable", "--set", "epochs=2", "--set", "batch_size=8", "--set", "task=follow", "--candidates", "2,4")


def test_the_least_sharp_of_near_equal_policies_is_picked(cli, tmp_path):
    cli(*SEARCH, "--budget", "bitops=w3a3", "--pick", "least-sharp", "--out", tmp_path / "p.json")
    assert Policy.load(tmp_path / "p.json").provenance["pick"] == "least-sharp"


def test_a_search_that_trains_keeps_its_checkpoint_and_the_policy_so_far(cli, tmp_path):
    cli(*SEARCH, *TRAINING, "--budget", "bitops=w3a3", "--folder", tmp_path / "run", "--out", tmp_path / "p.json")
    so_far, found = (Policy.load(path) for path in (tmp_path / "run" / "policy.json", tmp_path / "p.json"))
    assert so_far.layers == found.layers
    assert (tmp_path / "run" / "search" / "checkpoint.safetensors").is_file()
    lines = (tmp_path / "run" / "search" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    again = cli(*SEARCH, *TRAINING, "--budget", "bitops=w3a3", "--folder", tmp_path / "run")
    assert "resuming" in again.err
    assert "epoch 2/2" not in again.err


def test_a_folder_of_another_search_is_refused(cli, tmp_path):
    cli(*SEARCH, *TRAINING, "--budget", "bitops=w3a3", "--folder", tmp_path / "run")
    shown = run_cli(*SEARCH, *TRAINING, "--set", "lr=0.02", "--budget", "bitops=w3a3", "--folder", tmp_path / "run")
    assert shown.code == 2
    assert "settings.lr was 0.01 and is 0.02; give another folder, or delete this one" in shown.err
    shown = run_cli(*SEARCH, *TRAINING, "--budget", "bitops=w4a4", "--folder", tmp_path / "run")
    assert shown.code == 2
    assert re.search(r"is of another search: budget\.bitops was \d+ and is \d+; give another folder, or delete this one", shown.err)


def test_the_policy_so_far_can_be_shown_on_its_network(cli, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitscape.searches.mixture_search.read_out", stop)
    run_cli(*SEARCH, *TRAINING, "--budget", "bitops=w3a3", "--folder", tmp_path / "run")
    shown = cli("policy", "show", tmp_path / "run" / "policy.json", *MODEL)
    assert "after epoch 2 of 2, by readout probability" in shown.out


def test_an_interrupted_search_says_how_to_go_on(cli, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitscape.searches.mixture_search.read_out", stop)
    shown = run_cli(*SEARCH, *TRAINING, "--budget", "bitops=w3a3", "--folder", tmp_path / "run")
    assert shown.code == 130
    assert f"the policy so far is {tmp_path / 'run' / 'policy.json'}; run the same command to go on" in shown.err


def _latency(path, fast: float, runtime="runtime 1"):
    """A table in which every layer takes 1 ms alone, and `fast` at 4 weight bits."""
    shapes = layer_shapes(digits_net())
    LatencyTable(
        runtime=runtime,
        machine="some cpu",
        threads=1,
        batch_size=1,
        input_shape=(1, 8, 8),
        fingerprint=fingerprint(shapes),
        network_ms=2.0,
        float_ms=9.0,
        layers={name: {"8/8": 1.0, "4/8": fast} for name in shapes},
    ).save(path)
    return path


FOUR_OR_EIGHT = ("--candidates", "w=4,8;a=8", "--set", "images=8")


def test_a_cap_in_milliseconds_is_met_by_search_and_by_solve(cli, tmp_path):
    table, found, solved, scores = (tmp_path / f"{name}.json" for name in ("table", "found", "solved", "scores"))
    budget = ("--latency", _latency(table, 0.5), "--budget", "latency_ms=1.8ms")
    shown = cli(*SEARCH, *FOUR_OR_EIGHT, *budget, "--out", found, "--scores", scores)
    policy = Policy.load(found)
    assert 0 < policy.cost["latency_ms"] <= 1.8
    assert policy.provenance["latency"]["runtime"] == "runtime 1"
    assert "latency_ms: runtime 1, some cpu, threads: 1, batch: 1" in shown.out
    assert "flat" not in shown.err
    cli("solve", *MODEL, "--scores", scores, "--input-shape", "1x8x8", *budget, "--out", solved)
    assert Policy.load(solved).layers == policy.layers
    assert Policy.load(solved).provenance["latency"]["machine"] == "some cpu"
    front = cli("solve", *MODEL, "--scores", scores, "--input-shape", "1x8x8", *budget[:2], "--front", 3, "--along", "latency_ms")
    assert "latency_ms=" in front.out.splitlines()[0]


def test_a_flat_table_is_told_before_the_search(cli, tmp_path):
    table = _latency(tmp_path / "table.json", 1.01)
    told = "warning: latency table (runtime 1, some cpu, threads: 1, batch: 1) is flat below 8 bits"
    assert cli(*SEARCH, *FOUR_OR_EIGHT, "--latency", table, "--budget", "weight_bytes=0.7x").err.count(told) == 1
    shown = run_cli(*SEARCH, *FOUR_OR_EIGHT, "--latency", table, "--budget", "latency_ms=0.9x")
    assert shown.code == 2
    assert "flat below 8 bits" in shown.err and "feasible from 2.0" in shown.err


def test_a_budget_in_milliseconds_says_how_to_get_a_table(refused, trained):
    assert "bitscape latency build" in refused(*SEARCH, "--budget", "latency_ms=2")
    solve = ("solve", *MODEL, "--scores", trained / "scores.json", "--input-shape", "1x8x8")
    assert "bitscape latency build" in refused(*solve, "--budget", "latency_ms=2")
    assert "bitscape latency build" in refused(*solve, "--front", 3, "--along", "latency_ms")


def test_a_profile_restricts_the_bits_and_says_what_they_do(cli, tmp_path):
    shown = cli(*SEARCH, "--target", "openvino", "--budget", "weight_bytes=0.5x", "--pin", "down.0=6/8", "--out", tmp_path / "p.json")
    policy = Policy.load(tmp_path / "p.json")
    assert all(TARGETS["openvino"].allows(bits) for bits in policy.layers.values())
    assert policy.provenance["target"] == "openvino"
    assert TARGETS["openvino"].note(policy) in shown.out
    assert "warning" not in shown.err
    shown = cli(*SEARCH, "--target", "openvino", "--budget", "bitops=0.6x", "--pin", "down.0=6/8")
    assert shown.err.count("says nothing about time on openvino") == 1


@pytest.mark.parametrize("bits", [4, 5])
def test_without_a_profile_bytes_of_files_that_store_weights_wider_are_told(bits, cli, tmp_path):
    search = (*SEARCH, "--candidates", f"w={bits};a=8", "--budget", "weight_bytes=0.9x", "--method", "uniform")
    shown = cli(*search, "--out", tmp_path / "p.json").out
    assert ("weight_bytes are those of packed files" in shown) == (bits == 5)
    if bits == 5:
        assert re.search(r"take .*B in ONNX files and .*B in OpenVINO files: .* --target onnx-container or --target openvino", shown)


def test_times_of_another_runtime_than_the_profiles_are_told(cli, tmp_path):
    table, scores = _latency(tmp_path / "table.json", 0.5, "onnxruntime 1.24"), tmp_path / "scores.json"
    common = (*FOUR_OR_EIGHT, "--latency", table, "--budget", "weight_bytes=0.7x", "--target")
    told = "warning: latency table (onnxruntime 1.24, some cpu, threads: 1, batch: 1) was measured in onnxruntime, and target openvino"
    assert cli(*SEARCH, *common, "openvino", "--scores", scores).err.count(told) == 1
    assert "was measured in" not in cli(*SEARCH, *common, "onnx-container").err
    solve = ("solve", *MODEL, "--scores", scores, "--input-shape", "1x8x8", *common[-5:])
    assert cli(*solve, "openvino").err.count(told) == 1
    assert "warning" not in cli(*solve, "onnx-container").err


def test_solving_keeps_to_a_target(cli, refused, trained, tmp_path):
    solve = ("solve", *MODEL, "--scores", trained / "scores.json", "--input-shape", "1x8x8", "--budget", "weight_bytes=0.5x")
    shown = cli(*solve, "--target", "openvino", "--out", tmp_path / "p.json")
    policy = Policy.load(tmp_path / "p.json")
    assert all(TARGETS["openvino"].allows(bits) for bits in policy.layers.values())
    assert policy.provenance["target"] == "openvino"
    assert TARGETS["openvino"].note(policy) in shown.out
    cli(*solve, "--out", tmp_path / "free.json")
    assert not all(TARGETS["openvino"].allows(bits) for bits in Policy.load(tmp_path / "free.json").layers.values())
    wide = cli(*solve[:-1], "weight_bytes=1x", "--target", "htp")  # it has no layer with more than 32 outputs
    assert "htp: 0 of 8 layers have fewer than 8 weight bits" in wide.out
    assert "pinned: layer 'down.0': 4/4" in refused(*solve, "--target", "openvino", "--pin", "down.0=4/4")
    two = tmp_path / "two.json"
    ScoreTable(("down.0",), (LayerBits(2, 2),), [[1.0]], "fisher").save(two)
    given = (*solve[:4], two, *solve[5:], "--target", "openvino")
    assert "--scores: 2/2 weight/activation bits are not what target openvino" in refused(*given)


def test_what_a_profile_does_not_have_is_refused(refused):
    common = (*SEARCH, "--budget", "weight_bytes=0.5x", "--target")
    assert "candidates: 2/8, 5/8 weight" in refused(*common, "cortex-m", "--candidates", "w=2,4,5;a=8")
    assert "pinned: layer 'down.0': 4/4" in refused(*common, "openvino", "--pin", "down.0=4/4")
    assert "cpu-int8" in refused(*common, "cpu")


def test_the_help_names_the_profiles(cli):
    shown = " ".join(cli("search", "--help").out.split())
    assert all(name in shown for name in TARGETS)


def test_a_search_that_keeps_nothing_says_so(cli, tmp_path):
    word = "the policy will be shown and not kept"
    uniform = (*SEARCH, "--method", "uniform", "--budget", "bitops=w4a4")
    assert word in cli(*uniform).err
    assert word not in cli(*uniform, "--out", tmp_path / "p.json").err


def test_repairs_and_caps_that_do_not_bind_are_said(cli, tmp_path):
    free = "not binding: bitops, weight_bytes; the widest bits, 8/8 in every free layer, stay within every cap: "
    budgets = ("--budget", "bitops=1x", "--budget", "weight_bytes=1x")
    shown = cli(*SEARCH, *budgets, "--scores", tmp_path / "s.json", "--out", tmp_path / "p.json").out
    policy, scores = Policy.load(tmp_path / "p.json"), ScoreTable.load(tmp_path / "s.json")
    inner = [bits for name, bits in policy.layers.items() if name not in ("stem.0", "head")]
    assert f"{free}{inner.count(LayerBits(8, 8))} of {len(inner)} free layers have them" in shown
    assert f"{scores.repairs} of {scores.values.size} scores repaired" in shown
    one = cli(*SEARCH, "--method", "uniform", "--budget", "bitops=w4a4", "--budget", "weight_bytes=1x").out
    assert "not binding: weight_bytes; the widest bits, 8/8 in every free layer, stay within\n" in one
    assert "not binding" not in cli(*SEARCH, "--method", "uniform", "--budget", "bitops=w4a4").out


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "uniform", "--scores", "s.json", "--budget", "bitops=w4a4"),
        ("--method", "uniform", "--pick", "least-sharp", "--budget", "bitops=w4a4"),
        ("--folder", "f", "--budget", "bitops=w4a4"),
        ("--budget", "bitops=w4a9"),
        ("--budget", "bitopps=w4a4"),
        ("--budget", "latency_ms=2"),
        ("--budget", "bitops=w4a4", "--data", "photos"),
        ("--budget", "bitops=w4a4", "--normalize", "imgenet"),
        ("--budget", "bitops=w4a4", "--seed", 10**23),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_loaded(refused, monkeypatch, options):
    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("bitscape.cli.search.load_network", never)
    refused(*SEARCH, *options)


def test_fewer_images_than_the_default_are_all_used_and_this_is_said(cli, refused, tmp_path):
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    few = ("search", *MODEL, "--data", tmp_path / "few.npz", "--normalize", "0/1", "--budget", "bitops=w4a4", "--out", tmp_path / "p.json")
    assert f"{tmp_path / 'few.npz'}: using all 20 images; 256 is the default" in cli(*few).err
    assert Policy.load(tmp_path / "p.json").provenance["images"] == [20, 1, 8, 8]
    assert "images is 21; few allows 1 to 20" in refused(*few, "--images", 21)
