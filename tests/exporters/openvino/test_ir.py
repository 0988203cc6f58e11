import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.containers import packed_bytes
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.exporters.openvino.ir import CONTAINERS, OpenvinoInfo, openvino_model, pack, save_openvino, write_openvino
from bitscape.runtimes.sessions import OpenVino
from tests.exporters import networks
from tests.exporters.networks import OUTPUTS_OF_HEADS, Applied, head, images, made, mobile, one_graph, other_images, plain, quantized
from tests.needs import runtime_or_skip

pytestmark = pytest.mark.slow

openvino: Any = runtime_or_skip("openvino")
pytest.importorskip("onnxscript")

X = images(64)
WIDTHS = (2, 3, 4, 6)
Written = Callable[[str], tuple[OpenvinoInfo, Any]]


def tokens() -> nn.Module:
    """Linear layers of three-dimensional inputs: products with a transposed weight."""

    def forward(net: Any, x: Tensor) -> Tensor:
        rows = net.patches(x).flatten(2).transpose(1, 2)
        return net.second(net.first(rows).relu()).mean(1)

    return Applied(forward, patches=nn.Conv2d(3, 8, 4, 4), first=nn.Linear(8, 12), second=nn.Linear(12, 5, bias=False))


def joined() -> nn.Module:
    """Unsigned branches of other ranges, joined: OpenVINO computes wrongly if the quantizer behind does not round for itself."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).clamp(0, 6)
        x = torch.cat([net.branch(x).clamp(0, 6), nn.functional.avg_pool2d(x, 3, 1, 1), nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        return net.head(net.last(x).relu().mean((2, 3)))

    return Applied(forward, stem=nn.Conv2d(3, 8, 3), branch=nn.Conv2d(8, 8, 3, padding=1), last=nn.Conv2d(24, 8, 1), head=nn.Linear(8, 5))


def normed() -> nn.Module:
    """Norms that stay float behind products: one of tokens, and one of channels that something else takes, too."""

    def forward(net: Any, x: Tensor) -> Tensor:
        rows = net.first(net.patches(x).flatten(2).transpose(1, 2))
        rows = net.second(net.of_tokens(rows))
        return net.last(rows + net.of_channels(rows.transpose(1, 2)).transpose(1, 2)).mean(1)

    norms = {"of_tokens": nn.BatchNorm1d(16), "of_channels": nn.BatchNorm1d(12)}
    return Applied(forward, patches=nn.Conv2d(3, 8, 2, 2), first=nn.Linear(8, 8), second=nn.Linear(8, 12), last=nn.Linear(12, 5), **norms)


NETWORKS = {build.__name__: build for build in (plain, mobile, tokens, joined, normed)}


@cache
def integers(name: str) -> IntegerNetwork:
    narrow = {"bits": [(8, 4)]} if name == "joined" else {}
    return integer_network(quantized(made(NETWORKS[name]), X, **narrow), X)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("openvino")

    @cache
    def write(name: str) -> tuple[OpenvinoInfo, Any]:
        with one_graph(integers(name)):
            info = write_openvino(integers(name), folder / f"{name}.xml", X)
        return info, OpenVino().open(info.path)

    return write


def read_back(constants: list[tuple[np.ndarray, int]]) -> list[np.ndarray]:
    """What OpenVINO reads from packed constants of the given bits, each in its own."""
    op = openvino.opset13
    results = []
    for codes, bits in constants:
        memory = openvino.Tensor(getattr(openvino.Type, f"u{bits}"), [len(codes)])
        memory.data[:] = pack(codes, bits)
        results.append(op.result(op.convert(op.constant(memory), "u8")))
    compiled = openvino.Core().compile_model(openvino.Model(results, []), "CPU")({})
    return [compiled[i] for i in range(len(results))]


def test_bytes_by_hand() -> None:
    def packed(codes: list[int], bits: int) -> list[int]:
        return pack(np.array(codes, np.uint8), bits).tolist()

    assert packed([1, 2, 3, 0, 2], 2) == [0b00_11_10_01, 0b10]
    assert packed([0x1, 0xA, 0x7], 4) == [0xA1, 0x07]
    assert packed([0, 1, 2, 3, 4, 5, 6, 7], 3) == [0b00_01_10_11, 0b00_01_10_11, 0b00001111]
    assert packed([0x01, 0x12, 0x23, 0x34, 0x3F], 6) == [0x12, 0x34, 0b00_01_10_11, 0xF0, 0x00, 0b11_00_00_00]


@pytest.mark.parametrize("bits", WIDTHS)
def test_openvino_reads_every_code_at_every_place(bits: int) -> None:
    generator = np.random.default_rng(bits)
    top, places = 2**bits, 16
    grounds = [np.zeros(places), np.full(places, top - 1), generator.integers(0, top, places)]
    codes = np.array(
        [np.where(np.arange(places) == place, code, ground) for ground in grounds for place in range(places) for code in range(top)]
    )
    (found,) = read_back([(codes.astype(np.uint8).reshape(-1), bits)])
    np.testing.assert_array_equal(found, codes.reshape(-1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_openvino_reads_every_length(bits: int) -> None:
    generator = np.random.default_rng(bits)
    codes = [generator.integers(0, 2**bits, n).astype(np.uint8) for n in range(1, 26)]
    for given, found in zip(codes, read_back([(c, bits) for c in codes]), strict=True):
        np.testing.assert_array_equal(found, given)
    assert [packed_bytes(len(c), bits) for c in codes] == [len(pack(c, bits)) for c in codes]


def test_bytes_of_weights(written: Written) -> None:
    info, _ = written("plain")
    assert info.containers == {"0": 8, "3": 3, "7": 2, "9": 6}  # of 8, 3, 1 and 5 bits; one bit is -1 and 1, and two bits wide
    codes = 8 * 3 * 9 + 8 * 8 * 9 * 3 // 8 + 4 * 8 * 4 * 2 // 8 + 5 * 4 * 6 // 8
    assert info.container_bytes == codes + 2 * 4 * (8 + 8 + 4 + 5)  # scales and biases
    assert info.file_bytes == sum(info.path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_stand_in_their_containers(name: str, written: Written) -> None:
    info, _ = written(name)
    found = {
        layer.get("name"): layer.find("data").attrib for layer in ElementTree.parse(info.path).iter("layer") if layer.get("type") == "Const"
    }
    content = info.path.with_suffix(".bin").read_bytes()
    for key, weight in integers(name).weights.items():
        bits = info.containers[key.removesuffix(".weight")]
        assert bits == min(width for width in CONTAINERS if width >= weight.bits)
        transposed = f"{key}.transposed.codes" in found
        constant = found[f"{key}.transposed.codes" if transposed else f"{key}.codes"]
        q = (weight.q.T if transposed else weight.q).reshape(-1).numpy()
        unsigned = (q & 15 if bits == 4 else q + 2 ** (bits - 1)).astype(np.uint8)
        expected = q.astype(np.int8) if bits == 8 else pack(unsigned, bits)
        start, size = int(constant["offset"]), int(constant["size"])
        assert constant["element_type"] == (f"i{bits}" if bits in (4, 8) else f"u{bits}")
        assert content[start : start + size] == expected.tobytes()
    assert "f16" not in {constant["element_type"] for constant in found.values()}


def test_all_widths_are_met(written: Written) -> None:
    assert {bits for name in NETWORKS for bits in written(name)[0].containers.values()} == set(CONTAINERS)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_runs_in_float(name: str, written: Written) -> None:
    _, session = written(name)
    assert session.float_layers() == []
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in session._compiled.get_runtime_model().get_ops()]
    assert sum(kind in ("Convolution", "FullyConnected") for kind in kinds) == len(integers(name).weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_simulation_s(name: str, written: Written) -> None:
    _, session = written(name)
    with torch.no_grad():
        expected = integers(name).module(X).numpy()
    error = np.abs(session.run(X.numpy())[0] - expected).max(1) / np.abs(expected).max()
    # Measured: 2e-7 at most, in every image. One code in 1e5 may be rounded to the other side, which shows in its image alone.
    assert (error < 1e-5).mean() > 0.95
    assert error.max() < 0.2


def test_outputs_of_a_structure_keep_their_names_and_their_values(tmp_path: Path) -> None:
    _, network = networks.integers("heads")
    with one_graph(network):
        session = OpenVino().open(write_openvino(network, tmp_path / "heads.xml", images()).path)
    assert (session.outputs, session.float_layers()) == (OUTPUTS_OF_HEADS, [])
    x = other_images()
    for (name, expected), values in zip(run_integers(network, x).items(), session.run(x.numpy()), strict=True):
        assert values.shape == tuple(expected.shape), name
        assert np.linalg.norm(values - expected.numpy()) <= 0.01 * np.linalg.norm(expected), name
        assert len(np.unique(values)) > 1000 or name in ("logits", "anchors"), name


def test_padding_of_every_mode_is_computed_in_integers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        padded = (nn.Conv2d(8, 8, (3, 5), padding=(1, 2), padding_mode=mode) for mode in ("circular", "reflect", "replicate"))
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *(part for conv in padded for part in (conv, nn.ReLU())), *head(8))

    network = integer_network(quantized(made(build), images(), bits=[(8, 8), (4, 4)]), images())
    session = OpenVino().open(write_openvino(network, tmp_path / "padded.xml", images()).path)
    expected = run_integers(network, other_images())["output0"].numpy()
    assert session.float_layers() == []
    np.testing.assert_allclose(session.run(other_images().numpy())[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_batch_size_is_free(written: Written) -> None:
    _, session = written("plain")
    together = session.run(X[:5].numpy())[0]
    for n in (1, 3):
        np.testing.assert_allclose(session.run(X[:n].numpy())[0], together[:n], atol=1e-6)


def test_same_network_gives_the_same_files(tmp_path: Path, written: Written) -> None:
    first, _ = written("plain")
    with one_graph(integers("plain")):  # made anew below: `test_saved_from_a_quantized_network`
        again = write_openvino(integers("plain"), tmp_path / "again.xml", X)
    for suffix in (".xml", ".bin"):
        assert first.path.with_suffix(suffix).read_bytes() == again.path.with_suffix(suffix).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.bin", "again.xml"]
    assert str(tmp_path).encode() not in again.path.read_bytes()


def test_saved_from_a_quantized_network(tmp_path: Path, written: Written) -> None:
    network = quantized(made(plain), X)
    info, expected = save_openvino(network, tmp_path / "net.xml", X), written("plain")[0]
    for suffix in (".xml", ".bin"):
        assert info.path.with_suffix(suffix).read_bytes() == expected.path.with_suffix(suffix).read_bytes()
    assert info.added == len(integers("plain").added)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with one_graph(integers("plain")), pytest.raises(FileNotFoundError):
        write_openvino(integers("plain"), tmp_path / "absent" / "net.xml", X)
    assert list(tmp_path.iterdir()) == []


def test_the_path_must_end_in_xml() -> None:
    with pytest.raises(BitscapeError, match=r"net\.onnx does not end in \.xml"):
        save_openvino(nn.Identity(), "net.onnx", X)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BitscapeError, match=r"bitscape\[openvino\]"):
        write_openvino(integers("plain"), "net.xml", X)


def test_equal_constants_are_one_but_for_codes() -> None:
    """Two convolutions of equal weights: each keeps its codes, scales are shared, and so are the ends of quantizers."""
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.load_state_dict(first.state_dict())
    network = integer_network(quantized(nn.Sequential(first, nn.ReLU(), second, nn.Flatten()), X, [(8, 8)]), X)
    model, _ = openvino_model(network, X)
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    codes = [node for node in constants if node.get_element_type() == openvino.Type.i8]
    others = [(str(node.get_element_type()), tuple(node.shape), node.data.tobytes()) for node in constants if node not in codes]
    assert len(codes) == 2 and np.array_equal(codes[0].data, codes[1].data)
    assert len(others) == len(set(others))
