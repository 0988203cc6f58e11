import collections

import numpy as np
import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.measure import baselines
from bitscape.measure.baselines import save_float_onnx, save_onnxruntime_int8
from bitscape.models.digits import digits_net
from bitscape.runtimes.sessions import RUNTIMES
from tests.needs import runtime_or_skip

onnx = pytest.importorskip("onnx")
runtime_or_skip("onnxruntime")

IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _operators(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    found = digits_net()
    with torch.no_grad():
        for _ in range(50):  # norms that do something
            found(IMAGES)
    return found.eval()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    plain = save_float_onnx(network, folder / "float.onnx", IMAGES)
    return plain, save_onnxruntime_int8(plain, folder / "int8.onnx", IMAGES)


@pytest.fixture(scope="module")
def expected(network):
    with torch.no_grad():
        return network(IMAGES).numpy()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_float_file_computes_what_the_network_does(runtime, files, expected):
    runtime_or_skip(runtime)
    session = RUNTIMES[runtime]().open(files[0])
    for batch in (1, 7, 40):
        np.testing.assert_allclose(session.run(IMAGES[:batch].numpy())[0], expected[:batch], rtol=1e-4, atol=1e-5)
    assert len(session.float_layers()) == 8


def test_the_float_file_has_no_norms_and_little_beside_its_weights(files, network):
    assert _operators(files[0]) == {"Conv": 7, "Relu": 7, "Add": 2, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1}
    layers = sum(
        module.weight.numel() + module.weight.shape[0] for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    )
    assert 0 < files[0].stat().st_size - 4 * layers < 4000


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_int8_file_runs_in_integers_and_is_near(runtime, files, expected):
    runtime_or_skip(runtime)
    session = RUNTIMES[runtime]().open(files[1])
    assert session.float_layers() == []
    found = session.run(IMAGES.numpy())[0]
    assert 0 < np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_int8_weights_have_a_scale_for_each_channel_and_activations_are_uint8(files):
    graph = onnx.load(files[1]).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 8
    for layer in layers:
        codes, scale, _ = (constants[name] for name in makers[layer.input[1]].input)
        assert codes.data_type == onnx.TensorProto.INT8
        assert list(scale.dims) == [max(codes.dims[0], scale.dims[0])]
        zero = constants[makers[layer.input[0]].input[2]]
        assert zero.data_type == onnx.TensorProto.UINT8


def test_the_ranges_come_from_all_images(files, tmp_path):
    bright = IMAGES.clone()
    bright[-1] *= 10  # in the last batch
    found = save_onnxruntime_int8(files[0], tmp_path / "bright.onnx", bright)
    scales = []
    for path in (files[1], found):
        graph = onnx.load(path).graph
        first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == graph.input[0].name)
        scales.append(next(float(onnx.numpy_helper.to_array(t)) for t in graph.initializer if t.name == first.input[1]))
    assert scales[0] == pytest.approx(float(IMAGES.max()) / 255, rel=1e-5)
    assert scales[1] == pytest.approx(float(bright.max()) / 255, rel=1e-5)


class Hidden(nn.Module):
    """Uses a convolution's weight behind the back of its module, so that folding would change the output."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv.weight.sum()


def test_norms_that_cannot_be_folded_stay(tmp_path, caplog):
    torch.manual_seed(0)
    network = Hidden()
    network(IMAGES)
    path = save_float_onnx(network, tmp_path / "hidden.onnx", IMAGES)
    assert network.training
    assert "the float network keeps its norms: " in caplog.text
    with torch.no_grad():
        expected = network.eval()(IMAGES).numpy()
    np.testing.assert_allclose(RUNTIMES["onnxruntime"]().open(path).run(IMAGES.numpy())[0], expected, rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > 0 else x


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        if torch.compiler.is_exporting():
            raise RuntimeError
        return self.head(x.flatten(1))


def test_an_error_without_a_message_is_told_by_its_type(tmp_path):
    with pytest.raises(BitscapeError, match=r"torch\.export cannot follow its forward \(RuntimeError: RuntimeError\); write it"):
        save_float_onnx(Silent(), tmp_path / "no.onnx", IMAGES)


def test_images_go_to_the_device_of_the_network(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "folded", lambda network, images: seen.append(images.device.type) or network)
    monkeypatch.setattr(baselines, "onnx_graph", lambda module, interface, images, *_, **__: seen.append(images.device.type) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_float_onnx(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to("meta"), tmp_path / "no.onnx", IMAGES)
    assert seen == ["meta", "meta"]


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(BitscapeError, match="1 images; give two at least"):
        save_float_onnx(digits_net(), tmp_path / "no.onnx", IMAGES[:1])
    with pytest.raises(BitscapeError, match=r"torch\.export cannot follow its forward .* and with x\.shape\[0\] for len\(x\)$"):
        save_float_onnx(Branching(), tmp_path / "no.onnx", IMAGES)
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(BitscapeError, match=r"text\.onnx: ONNX Runtime cannot quantize it"):
        save_onnxruntime_int8(tmp_path / "text.onnx", tmp_path / "no.onnx", IMAGES)
    assert not (tmp_path / "no.onnx").exists()
