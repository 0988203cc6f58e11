import json
import re

import pytest

from bitscape.cli.network import load_network
from bitscape.data.sources import load_dataset
from bitscape.measure import bench
from bitscape.report.documents import load_bench
from bitscape.runtimes.sessions import Timing
from tests.cli.run import MODEL, run_cli
from tests.needs import runtime_or_skip

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
runtime_or_skip("onnxruntime")

PAIR = ("--input-shape", "1x8x8", "--rounds", 2)


def _write(path, classes=10, side=8, batch="batch"):
    """A file that adds up the pixels of each column: column i is class i."""
    kind = onnx.TensorProto.FLOAT
    images = onnx.helper.make_tensor_value_info("images", kind, [batch, 1, side, side])
    sums = onnx.helper.make_tensor_value_info("sums", kind, [batch, side])
    axes = onnx.numpy_helper.from_array(onnx.numpy_helper.np.array([1, 2]), "axes")
    node = onnx.helper.make_node("ReduceSum", ["images", "axes"], ["sums"], keepdims=0)
    graph = onnx.helper.make_graph([node], "g", [images], [sums], [axes])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return [_write(folder / name) for name in ("a.onnx", "b.onnx")]


@pytest.fixture
def clock(monkeypatch):
    """The second file takes half the first one's time."""
    asked = []

    def time(runs, *, rounds, round_s, progress):
        asked.append((list(runs), rounds))
        return {name: Timing(8.0 / (1 + at), 10.0 / (1 + at), 0.03) for at, name in enumerate(runs)}

    monkeypatch.setattr(bench, "time_alternately", time)
    return asked


def _rows(out):
    """Of the table, split where columns are apart by two spaces; the last cell may be empty."""
    header, *lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    return [dict(zip(header, [*line, ""], strict=False)) for line in lines if len(header) - len(line) in (0, 1)]


def test_ratios_throughput_and_sizes_are_those_of_the_clock_and_the_files(cli, clock, files, tmp_path):
    shown = cli("bench", *files, *PAIR, "--batch-size", "1,16", "--json", tmp_path / "figures.json")
    rows = _rows(shown.out)
    assert clock == [(["0", "1"], 2)] * 2
    assert [(row["batch"], row[f"x {files[0].name}"], row["CPU ms"], row["wall ms"]) for row in rows] == [
        *[("1", "1.00", "8", "10"), ("1", "2.00", "4", "5")],
        *[("16", "1.00", "8", "10"), ("16", "2.00", "4", "5")],
    ]
    assert [row["images/s"] for row in rows] == ["100", "200", "1,600", "3,200"]
    assert {row["size"] for row in rows} == {f"{files[0].stat().st_size} B"}
    assert "threads: 1; median of 2 rounds" in shown.out and "by CPU time" in shown.out
    document = json.loads((tmp_path / "figures.json").read_text())
    assert (document["format"], document["threads"], document["rounds"], document["input_shape"]) == (1, 1, 2, [1, 8, 8])
    assert document["machine"] in shown.out and document["date"].endswith("+00:00")
    second = document["rows"][1]
    assert (second["file"], second["file_bytes"], second["float_layers"]) == (str(files[1]), files[1].stat().st_size, 0)
    assert (second["times_faster"], second["images_per_s"], second["cpu_ms"]) == (2.0, 200.0, 4.0)
    assert second["runtime"].startswith("onnxruntime 1.")
    assert "top1" not in second


def test_with_several_threads_files_are_compared_by_the_wall_clock(cli, clock, files):
    assert (
        "threads: 2; median of 2 rounds, each visiting every file; x: by wall-clock time" in cli("bench", *files, *PAIR, "--threads", 2).out
    )


def test_the_network_is_timed_in_float_and_as_onnxruntimes_int8_and_all_are_classified(cli, clock, files):
    shown = cli("bench", files[0], *MODEL, "--data", "digits", "--images", 16, "--accuracy", 60, "--rounds", 2)
    rows = _rows(shown.out)
    assert [row["file"] for row in rows] == ["float", "onnxruntime's int8", files[0].name]
    assert [row["float layers"] for row in rows] == ["8", "0", "0"]
    assert [row["x float"] for row in rows] == ["1.00", "2.00", "3.00"]
    digits = load_dataset("digits", split="test", limit=60, seed=0)
    classes = [load_network(MODEL[1], None, "cpu")(digits.images / 255).argmax(1), digits.images.sum((1, 2)).argmax(1)]
    for row, found in zip((rows[0], rows[2]), classes, strict=True):
        assert row["top-1"] == f"{100 * float((found == digits.labels).float().mean()):.2f} %"
        assert row["agrees"] == f"{100 * float((found == classes[0]).float().mean()):.2f} %"
    assert "top-1 and agreement with float on 60 images" in shown.out


def test_agreement_needs_no_labels(cli, clock, files, tmp_path):
    import numpy as np

    np.savez(tmp_path / "plain.npz", images=np.eye(8, dtype=np.uint8)[None].repeat(9, 0))
    rows = _rows(cli("bench", *files, "--data", tmp_path / "plain.npz", "--normalize", "0/1", "--accuracy", 9).out)
    assert [row["agrees"] for row in rows] == ["100.00 %"] * 2
    assert "top-1" not in rows[0]


def test_a_file_runs_in_the_runtime_of_its_suffix_or_in_those_given(cli, clock, files, tmp_path):
    openvino = runtime_or_skip("openvino")
    openvino.save_model(openvino.Core().read_model(files[0]), tmp_path / "a.xml")
    rows = _rows(cli("bench", files[0], tmp_path / "a.xml").out)
    assert [row["runtime"].split()[0] for row in rows] == ["onnxruntime", "openvino"]
    size = (tmp_path / "a.xml").stat().st_size + (tmp_path / "a.bin").stat().st_size
    assert rows[1]["size"] == f"{size / 1000:.4g} kB"
    both = _rows(cli("bench", files[0], "--runtime", "openvino", "--runtime", "onnxruntime").out)
    assert [row["runtime"].split()[0] for row in both] == ["openvino", "onnxruntime"]


def test_each_runtime_is_divided_by_its_own_float(cli, clock, files, tmp_path):
    runtime_or_skip("openvino")
    figures = ("--json", tmp_path / "figures.json")
    given = (*MODEL, "--images", 16, "--input-shape", "1x8x8", "--rounds", 2)
    shown = cli("bench", files[0], *given, "--runtime", "onnxruntime", "--runtime", "openvino", *figures).out
    # in the order of the rows they take 8, 4, 8/3, 2, 8/5 and 4/3 ms
    assert [(row["file"], row["runtime"].split()[0], row["x float"]) for row in _rows(shown)] == [
        *[("float", "onnxruntime", "1.00"), ("float", "openvino", "1.00")],
        *[("onnxruntime's int8", "onnxruntime", "3.00"), ("onnxruntime's int8", "openvino", "2.00")],
        *[(files[0].name, "onnxruntime", "5.00"), (files[0].name, "openvino", "3.00")],
    ]
    assert "x: by CPU time, within each runtime" in shown
    assert [row.times_faster for row in load_bench(tmp_path / "figures.json").rows] == pytest.approx([1, 1, 3, 2, 5, 3])


def test_what_has_no_float_in_its_runtime_is_divided_by_nothing(cli, clock, files, tmp_path):
    openvino = runtime_or_skip("openvino")
    openvino.save_model(openvino.Core().read_model(files[0]), tmp_path / "a.xml")
    shown = cli("bench", files[0], tmp_path / "a.xml", *PAIR, "--json", tmp_path / "figures.json").out
    assert [row[f"x {files[0].name}"] for row in _rows(shown)] == ["1.00", ""]
    assert [row.times_faster for row in load_bench(tmp_path / "figures.json").rows] == [1.0, None]
    cli("report", tmp_path / "figures.json", "--out", tmp_path / "report.html")


def test_real_clocks_time_real_files(files):
    shown = run_cli("bench", *files, "--rounds", 2)
    assert shown.code == 0
    assert all(float(row["CPU ms"]) > 0 and float(row[f"x {files[0].name}"]) > 0 for row in _rows(shown.out))


def test_mistakes_end_in_one_clear_line(refused, files, tmp_path):
    assert "FILE is missing; give exported files, or --model" in refused("bench")
    assert "--accuracy needs --data" in refused("bench", files[0], "--accuracy", 10)
    assert "--batch-size '1,x': write whole numbers from 1" in refused("bench", files[0], "--batch-size", "1,x")
    assert "--batch-size '0'" in refused("bench", files[0], "--batch-size", "0")
    assert "--batch-size '2147483648': write whole numbers from 1 to 2147483647" in refused("bench", files[0], "--batch-size", 2**31)
    assert "takes images of 1x8x8, not 3x8x8" in refused("bench", files[0], "--input-shape", "3x8x8")
    assert "takes images of 1x9x9, not 1x8x8" in refused("bench", files[0], _write(tmp_path / "nine.onnx", side=9))
    fixed = _write(tmp_path / "fixed.onnx", batch=4)
    assert "takes batches of 4 alone; give --batch-size 4" in refused("bench", fixed, "--batch-size", "1,4")
    free = _write(tmp_path / "free.onnx", side="side")
    assert "--input-shape is missing, and no file tells it" in refused("bench", free)
    (tmp_path / "text.onnx").write_text("no network")
    assert "text.onnx: not readable as a file of a network" in refused("bench", tmp_path / "text.onnx")
    assert "--input-shape is missing" in refused("bench", *MODEL)
