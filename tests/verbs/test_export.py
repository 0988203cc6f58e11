"""Networks of several inputs and of outputs of every form, from float to checked files."""

import functools
import re

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.calling import call
from bitscape.data.samples import Samples
from bitscape.exporters.packed.file import load_packed
from bitscape.models.layers import layer_shapes
from bitscape.nested import tensors_in
from bitscape.policy import uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.repair import repair
from bitscape.runtimes.sessions import OpenVino
from tests.needs import runtime_or_skip
from tests.networks import CALLED, drawn

pytestmark = pytest.mark.slow

COUNT = 24
FLOAT, INT64, BOOL = 1, 7, 9
"""Types in an ONNX file."""


def samples_of(name: str) -> Samples:
    return Samples.of(CALLED[name].inputs(COUNT))


def policy_of(network: nn.Module) -> bs.Policy:
    return uniform_policy(layer_shapes(network), bs.LayerBits(4, 8))


@functools.cache
def quantized(name: str) -> nn.Module:
    network = CALLED[name].network()
    return bs.quantize(network, policy_of(network), samples_of(name))


def outputs_of(network: nn.Module, name: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(tensors_in(call(network, CALLED[name].inputs(COUNT))))


@pytest.mark.parametrize("name", CALLED)
def test_the_verb_quantizes_as_its_parts_do_in_order(name):
    network, samples = CALLED[name].network(), samples_of(name)
    folded = fold_norms(network, samples.first(2))
    expected = calibrate(with_quantizers(folded, policy_of(network)), samples)
    expected = repair(expected, folded, samples).eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quantized(name).modules())
    for ours, theirs in zip(outputs_of(quantized(name), name), outputs_of(expected, name), strict=True):
        assert torch.equal(ours, theirs)
    structure = [type(call(model, CALLED[name].inputs(3))) for model in (network, quantized(name))]
    assert structure[0] is structure[1]


@pytest.mark.parametrize("name", CALLED)
def test_packed_files_give_the_same_bits(name, tmp_path):
    folded = fold_norms(CALLED[name].network(), samples_of(name))
    report = bs.export(quantized(name), tmp_path / "net.safetensors", samples_of(name), float_model=folded)
    assert report.compared == COUNT and report.info.path == report.path
    loaded = load_packed(report.path, folded)
    assert all(map(torch.equal, outputs_of(loaded, name), outputs_of(quantized(name), name)))


@pytest.mark.parametrize("name", CALLED)
def test_onnx_files_compute_exact_integers_and_keep_names(name, tmp_path):
    onnx = pytest.importorskip("onnx", reason="pip install 'bitscape[onnx]'")
    runtime_or_skip("onnxruntime")
    report = bs.export(quantized(name), tmp_path / "net.onnx", samples_of(name))
    assert (report.parity.differing_codes, report.parity.float_layers) == (0, ())
    assert report.parity.codes > 1000 and report.compared == COUNT // 4
    graph = onnx.load(report.path).graph
    assert tuple(value.name for value in graph.input) == CALLED[name].input_names
    assert tuple(value.name for value in graph.output) == CALLED[name].output_names == tuple(report.exact)
    sizes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.input}
    assert all(shape[0] == 0 for key, shape in sizes.items() if key != "pair.1")  # 0: free
    assert sizes.get("pair.1", [8, 1, 1]) == [8, 1, 1]
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert types == {key: {"camera": INT64, "rows": BOOL}.get(key, FLOAT) for key in types}
    assert all(agreement.difference < 1e-5 for agreement in report.exact.values())
    assert all(agreement.difference < 0.05 for agreement in report.simulated.values())


@pytest.mark.parametrize("name", CALLED)
def test_openvino_files_compute_exact_integers_and_keep_names(name, tmp_path):
    runtime_or_skip("openvino")
    pytest.importorskip("onnx", reason="pip install 'bitscape[onnx]'")
    report = bs.export(quantized(name), tmp_path / "net.xml", samples_of(name))
    assert (report.parity.differing_codes, report.parity.float_layers) == (0, ())
    session = OpenVino().open(report.path)
    assert (session.inputs, session.outputs) == (CALLED[name].input_names, CALLED[name].output_names)


def test_classes_are_compared_where_one_output_is_logits_or_the_task_says_so(tmp_path):
    runtime_or_skip("onnxruntime")
    network, data = quantized("dict output"), samples_of("dict output")
    by_task = {
        task: bs.export(network, tmp_path / "net.onnx", data, task=task).exact["scores"].same_class for task in ("auto", "follow")
    }
    assert by_task == {"auto": 1.0, "follow": None}


def test_a_file_of_that_suffix_is_qonnx(tmp_path):
    onnx = pytest.importorskip("onnx", reason="pip install 'bitscape[onnx]'")
    report = bs.export(quantized("keywords"), tmp_path / "net.qonnx.onnx", samples_of("keywords"))
    model = onnx.load(report.path)
    quantizers = [node for node in model.graph.node if node.op_type == "Quant"]
    assert len(quantizers) == 6 and report.info.bits == {"conv.0": (4, 8), "features": (4, 8), "head": (4, 8)}
    assert [value.name for value in model.graph.input] == ["image", "features"]
    assert report.runtime is None and report.file_bytes == report.path.stat().st_size


def test_samples_of_several_shapes_are_quantized_and_refused_for_files(tmp_path):
    network = CALLED["dict output"].network()
    data = [drawn(8, 3, 8, 8), drawn(8, 3, 6, 6, seed=1)]
    ready = bs.quantize(network, policy_of(network), data)
    expected = fold_norms(network, data[0])
    calibrated = repair(calibrate(with_quantizers(expected, policy_of(network)), data), expected, data)
    assert torch.equal(ready(data[1])["scores"], calibrated.eval()(data[1])["scores"])
    with pytest.raises(bs.BitscapeError, match=re.escape("data: samples of shapes (3, 8, 8) and others of (3, 6, 6)")):
        bs.export(ready, tmp_path / "net.onnx", data)
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "onyx"}, "form='onyx': unknown; nearest: onnx, qonnx; use one of packed, onnx, openvino, qonnx, tflite"),
        ({"task": "class"}, "task='class': unknown; nearest: classes; use one of classes, dense, binary, follow, auto"),
        ({"held_out": drawn(4, 3, 6, 6)}, re.escape("data: samples of shapes (3, 8, 8) and others of (3, 6, 6)")),
        ({"inputs": lambda batch: batch.double()}, "example: torch.float64; give a float32 tensor"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message, tmp_path):
    data = drawn(8, 3, 8, 8)
    with pytest.raises(bs.BitscapeError, match=message):
        bs.export(quantized("dict output"), tmp_path / "net.onnx", data, **settings)


def test_a_packed_file_that_reads_back_otherwise_is_not_kept(tmp_path):
    name = "two images"
    other = fold_norms(CALLED[name].network(), samples_of(name))
    other.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(bs.BitscapeError, match="read back, its outputs differ"):
        bs.export(quantized(name), tmp_path / "net.safetensors", samples_of(name), float_model=other)
    assert not (tmp_path / "net.safetensors").exists()


def test_a_missing_folder_and_a_network_called_otherwise_are_named(tmp_path):
    with pytest.raises(bs.BitscapeError, match=r"there is no folder .*absent; create it"):
        bs.export(quantized("keywords"), tmp_path / "absent" / "net.onnx", samples_of("keywords"))
    for form in ("packed", "onnx"):
        with pytest.raises(bs.BitscapeError, match=r"there is no folder .*absent; create it"):
            bs.export(quantized("keywords"), tmp_path / "absent" / "net", samples_of("keywords"), form=form)
    network = CALLED["two images"].network()
    with pytest.raises(bs.BitscapeError, match=r"a batch is a Tensor.*missing a required argument: 'right'.*pass inputs="):
        bs.quantize(network, policy_of(network), drawn(4, 3, 8, 8))
