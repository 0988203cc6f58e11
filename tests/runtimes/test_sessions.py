import numpy as np
import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.graph import quiet
from bitscape.exporters.onnx.qdq import write_onnx
from bitscape.runtimes import sessions as runtime
from bitscape.runtimes.sessions import RUNTIMES, OnnxRuntime, OpenVino, by_name, layer_of_node, time_alternately
from tests.exporters.networks import MIXED, OUTPUTS_OF_HEADS, exported, images, integers, other_images
from tests.needs import runtime_or_skip

ALL = sorted(RUNTIMES)


@pytest.fixture
def opened(request):
    pytest.importorskip("onnx")
    runtime_or_skip(request.param)
    return RUNTIMES[request.param]().open


def with_float_layer(content: bytes, name: str) -> bytes:
    """The file with the quantizer behind a layer taken out: nothing takes codes from it any more."""
    import onnx

    model = onnx.load_from_string(content)
    (layer,) = (node for node in model.graph.node if node.name == name)
    (quantize,) = (node for node in model.graph.node if layer.output[0] in node.input)
    last = next(node for node in model.graph.node if quantize.output[0] in node.input)
    while last.op_type != "DequantizeLinear":
        last = next(node for node in model.graph.node if last.output[0] in node.input)
    for node in model.graph.node:
        for place, value in enumerate(node.input):
            if value == last.output[0]:
                node.input[place] = layer.output[0]
    return model.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize("opened", ALL, indirect=True)
@pytest.mark.parametrize("name", ["mobile", "geometries", "products", "convnext", "signals"])
def test_no_layer_of_integers_runs_in_float(opened, name):
    assert opened(exported(name).content).float_layers() == []


@pytest.mark.slow
def test_a_float_layer_is_named_by_onnx_runtime():
    runtime_or_skip("onnxruntime")
    content = with_float_layer(exported("plain").content, "3")
    session = OnnxRuntime().open(content)
    assert session.float_layers() == ["3"]
    assert session.float_layers() == ["3"]  # asking changes nothing


@pytest.mark.slow
@pytest.mark.parametrize("opened", ALL, indirect=True)
def test_float_weights_of_the_network_are_named_too(opened):
    found = set(opened(exported("floats").content).float_layers())
    assert "stem" not in found
    assert len(found - {"last", "up"}) == 2  # ONNX Runtime has no integer convolution with float results, as the last one's are


@pytest.mark.slow
@pytest.mark.parametrize("opened", ALL, indirect=True)
def test_outputs_have_names_and_the_values_of_exact_integers(opened):
    case, x = exported("heads"), other_images()
    session = opened(case.content)
    assert session.outputs == OUTPUTS_OF_HEADS
    for (name, expected), values in zip(run_integers(case.integer, x).items(), session.run(x.numpy()), strict=True):
        assert values.shape == tuple(expected.shape), name
        assert np.linalg.norm(values - expected.numpy()) <= 0.01 * np.linalg.norm(expected), name


@pytest.mark.slow
@pytest.mark.parametrize("opened", ALL, indirect=True)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_file_takes_any_number_of_images(opened, n, tmp_path):
    case, x = exported("mobile"), other_images()[:n]
    (tmp_path / "net.onnx").write_bytes(case.content)
    from_path, from_bytes = (opened(source).run(x.numpy()) for source in (tmp_path / "net.onnx", case.content))
    assert np.array_equal(from_path[0], from_bytes[0])
    with torch.no_grad():
        expected = case.integer.module(x).numpy()
    np.testing.assert_allclose(from_path[0], expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("opened", ALL, indirect=True)
def test_all_outputs_come_back_in_order(opened):
    session = opened(exported("repeated").content)
    scores, features = session.run(images(3).numpy())
    assert (scores.shape, features.shape) == ((3, 5), (3, 8, 6, 6))


@pytest.mark.parametrize("opened", ALL, indirect=True)
def test_what_a_runtime_refuses_is_an_error_with_the_reason(opened, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(BitscapeError, match=r"net\.onnx: .* does not load it"):
        opened(tmp_path / "net.onnx")
    with pytest.raises(BitscapeError, match=r"the model: .* does not load it: .{10}"):
        opened(b"no model")


@pytest.mark.slow
def test_openvino_says_that_it_reads_no_2_bits(tmp_path):
    runtime_or_skip("openvino")
    _, integer = integers("mobile", MIXED)
    info = write_onnx(integer, tmp_path / "net.onnx", images())
    with pytest.raises(BitscapeError, match="OpenVINO does not load it: "):
        OpenVino().open(info.path)


@pytest.mark.parametrize(("kind", "package", "extra"), [(OnnxRuntime, "onnxruntime", "onnx"), (OpenVino, "openvino", "openvino")])
def test_a_missing_runtime_is_named_with_the_extra_that_brings_it(kind, package, extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)  # import raises then
    with pytest.raises(BitscapeError, match=rf"{package}.*pip install 'bitscape\[{extra}\]'"):
        kind().open(b"")
    with pytest.raises(BitscapeError, match=extra):
        _ = kind().version


def test_versions_are_a_name_and_a_number():
    for name in ALL:
        runtime_or_skip(name)
        assert RUNTIMES[name]().version.split(" ")[0] == name
        assert all(part.isdigit() for part in RUNTIMES[name]().version.split(" ")[1].split("."))


class Clock:
    """Time that passes only while something runs; half of it is CPU time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2

    def run(self, name: str, *seconds: float):
        """A run that lasts these times in turn, the last one from then on."""
        waiting = list(seconds)

        def once() -> None:
            self.log.append(name)
            self.now += waiting.pop(0) if len(waiting) > 1 else waiting[0]

        return once


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runtime, "time", clock)
    return clock


def test_every_round_visits_each_run(clock):
    done = []
    runs = {"slow": clock.run("slow", 0.125), "fast": clock.run("fast", 0.0625)}
    times = time_alternately(runs, rounds=2, round_s=0.375, progress=done.append)
    before, visits = ["slow"] * 2 + ["fast"] * 2, ["slow"] * 3 + ["fast"] * 6
    assert clock.log == before + visits + visits
    assert done == [1, 2]
    assert (times["slow"].wall_ms, times["slow"].cpu_ms) == pytest.approx((125, 62.5))
    assert (times["fast"].wall_ms, times["fast"].cpu_ms, times["fast"].spread) == pytest.approx((62.5, 31.25, 0))
    assert times["fast"].ms(1) == times["fast"].cpu_ms and times["fast"].ms(2) == times["fast"].wall_ms


def test_a_long_run_is_timed_thrice_a_round_at_least(clock):
    time_alternately({"long": clock.run("long", 7.0)}, rounds=4, round_s=0.2)
    assert len(clock.log) == 2 + 4 * 3


def test_medians_forget_what_came_in_between(clock):
    # Two runs before, then three rounds of three: in the first, one is disturbed; the whole second is.
    disturbed = [1.0, 1.0, 1.0, 9.0, 1.0, 5.0, 5.0, 5.0, 1.0]
    times = time_alternately({"a": clock.run("a", *disturbed)}, rounds=3, round_s=0.1)
    assert (times["a"].wall_ms, times["a"].cpu_ms) == pytest.approx((1000, 500))
    assert times["a"].spread == pytest.approx(np.std([1, 5, 1]))


def test_what_takes_no_time_is_no_division_by_zero(clock):
    times = time_alternately({"nothing": clock.run("nothing", 0.0), "some": clock.run("some", 1.0)}, rounds=1, round_s=1e-5)
    assert times["some"].wall_ms == pytest.approx(1000) and times["nothing"].spread == 0


@pytest.mark.slow
def test_an_onnx_file_of_float_layers_only_names_them(tmp_path):
    runtime_or_skip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "float.onnx"
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    with quiet():
        torch.onnx.export(network, (images(2),), path, dynamo=True, verbose=False)
    assert len(OnnxRuntime().open(path).float_layers()) == 2


def test_inputs_are_fed_by_name_and_other_names_refused():
    left, right = np.zeros(1), np.ones(1)
    assert by_name(left, ["x"]) == {"x": left}
    assert by_name({"b": right, "a": left}, ["a", "b"]) == {"a": left, "b": right}
    with pytest.raises(BitscapeError, match="one array, and the file takes a, b; give arrays by these names"):
        by_name(left, ["a", "b"])
    with pytest.raises(BitscapeError, match="inputs: a; the file takes a, b"):
        by_name({"a": left}, ["a", "b"])


def test_layers_may_have_slashes_in_their_names():
    names = ["Conv/0", "Conv/0/WithoutBiases", "Conv/0/behind12", "Conv/0/WithoutBiases/fq_weights_1", "stem/behind/1"]
    assert [layer_of_node(name) for name in names] == ["Conv/0"] * 4 + ["stem/behind/1"]
