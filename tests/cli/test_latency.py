import json
import os
import re
import threading

import pytest

from bitscape.cli.latency import shown_pairs
from bitscape.cost.latency import LatencyTable
from bitscape.folders import locked
from bitscape.measure import layer_times
from bitscape.policy import Policy
from tests.cli.run import MODEL, run_cli
from tests.needs import runtime_or_skip

pytestmark = pytest.mark.slow

pytest.importorskip("onnx")
runtime_or_skip("onnxruntime")

BUILD = ("latency", "build", *MODEL)
QUICK = ("--input-shape", "1x8x8", "--rounds", 1)
NETWORK = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
"""
LAYERS = ["stem.0", "block1.conv1", "block1.conv2", "down.0", "block2.conv1", "block2.conv2", "widen.0", "head"]


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(layer_times, "ROUND_S", 0.0005)


@pytest.fixture
def tiny(tmp_path):
    """The command for a network of two layers."""
    (tmp_path / "tiny.py").write_text(NETWORK)
    return ("latency", "build", "--model", f"{tmp_path / 'tiny.py'}:tiny")


@pytest.fixture(scope="module")
def built(tmp_path_factory, request):
    """A table of two pairs, measured in ONNX Runtime, and what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_times, "ROUND_S", 0.0005)
        path = tmp_path_factory.mktemp("latency") / "table.json"
        shown = run_cli(*BUILD, *QUICK, "--candidates", "w=4,8;a=8", "--out", path)
    assert shown.code == 0, shown.err
    return path, shown


def test_the_table_is_of_the_network_in_the_runtime(built):
    path, shown = built
    table = LatencyTable.load(path)
    assert list(table.layers) == LAYERS
    assert all(list(times) == ["8/8", "4/8"] for times in table.layers.values())
    assert table.runtime.startswith("onnxruntime 1.")
    assert (table.threads, table.batch_size, table.input_shape) == (1, 1, (1, 8, 8))
    assert table.layers["block1.conv1"] == table.layers["block1.conv2"]  # of one form
    assert not path.with_name("table.json.partial").exists()
    assert "layers of 7 forms, each in 2 models" in shown.err


def test_what_is_printed_is_the_table(built):
    path, shown = built
    table = LatencyTable.load(path)
    rows = {line.split()[0]: line.split() for line in shown.out.splitlines() if line.strip()}
    for name in LAYERS:
        assert [float(text) for text in rows[name][-2:]] == pytest.approx([1000 * ms for ms in table.layers[name].values()], rel=1e-3)
    assert f"whole network: {table.network_ms:.4g} ms at 8/8, {table.float_ms:.4g} ms in float" in shown.out
    assert (table.note() or "fewer bits take it down to") in shown.out
    assert f"use it: bitscape search --latency {path}" in shown.out


def test_a_search_takes_the_table(built, cli, tmp_path):
    path, _ = built
    table = LatencyTable.load(path)
    cap = 3 * table.network_ms  # times of single layers are noisy
    options = ("--data", "digits", "--images", 8, "--candidates", "w=4,8;a=8", "--latency", path)
    out = tmp_path / "policy.json"
    cli("search", *MODEL, *options, "--budget", f"latency_ms={cap}", "--budget", "weight_bytes=0.6x", "--out", out)
    policy = Policy.load(out)
    scale = table.network_ms / sum(times["8/8"] for times in table.layers.values())
    spent = scale * sum(table.layers[name][str(bits)] for name, bits in policy.layers.items())
    assert spent <= cap + 1e-5


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(cli, tiny, monkeypatch, tmp_path):
    out, timed, real = tmp_path / "table.json", [], layer_times.time_alternately

    def stopping(runs, **given):
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append([name for name in runs if name])
        return real(runs, **given)

    monkeypatch.setattr(layer_times, "time_alternately", stopping)
    stopped = run_cli(*tiny, *QUICK, "--out", out)
    assert stopped.code == 130 and not out.exists()
    partial = out.with_name("table.json.partial")
    assert f"{partial} keeps what is measured; run the same command to go on" in stopped.err
    kept = json.loads(partial.read_text())["times"]
    assert len(kept) == 2 + 3  # the network, one of two forms in three containers
    before, timed[:] = list(timed), []
    monkeypatch.setattr(layer_times, "time_alternately", lambda runs, **given: timed.append([n for n in runs if n]) or real(runs, **given))
    went_on = cli(*tiny, *QUICK, "--out", out)
    assert f"{partial}: 5 times are measured already" in went_on.err
    assert not {name for names in before for name in names} & {name for names in timed for name in names}
    assert LatencyTable.load(out).network_ms == kept["8/8"]
    assert not partial.exists()


def test_a_table_that_another_thread_measures_is_refused(tiny, tmp_path):
    shown = []

    def attempt():
        shown.append(run_cli(*tiny, *QUICK, "--out", tmp_path / "table.json"))

    with locked(tmp_path, "table.json"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert shown[0].code == 2
    assert f"{tmp_path / 'table.json'}: process {os.getpid()} on " in shown[0].err
    assert not list(tmp_path.glob("table.json*"))


def test_openvino_measures_its_own_profile_on_images(cli, tiny, tmp_path):
    runtime_or_skip("openvino")
    out = tmp_path / "table.json"
    given = ("--data", "digits", "--images", 8, "--rounds", 1, "--runtime", "openvino", "--batch-size", 2)
    shown = cli(*tiny, *given, "--out", out)
    table = LatencyTable.load(out)
    assert table.runtime.startswith("openvino ") and table.batch_size == 2
    assert set(table.layers["3"]) == {"8/8", "2/8", "3/8", "4/8", "6/8"}
    assert table.layers["3"]["2/8"] == table.layers["3"]["4/8"] and table.layers["3"]["6/8"] == table.layers["3"]["8/8"]
    assert re.search(r"us of a layer alone, at +kind +MACs of an image +8/8 +2/8 +3/8 +4/8 +6/8", shown.out)


def test_many_pairs_are_shown_in_part():
    few = ["8/8", "4/8", "4/4"]
    assert shown_pairs(few) == few
    assert shown_pairs([f"{w}/{a}" for w in (8, 2, 3, 4) for a in (8, 2, 4)]) == ["8/8", "8/2", "2/8", "3/8", "4/8"]


def test_mistakes_end_in_one_clear_line(refused, tmp_path):
    out = ("--out", tmp_path / "table.json")
    assert "give --input-shape for random images, e.g. 3x224x224, or --data" in refused(*BUILD, *out)
    assert "exactly one of the two" in refused(*BUILD, "--data", "digits", *QUICK, *out)
    assert "no folder" in refused(*BUILD, *QUICK, "--out", tmp_path / "none" / "table.json")
    assert "See `bitscape latency build --help`" in refused(*BUILD, *QUICK)
