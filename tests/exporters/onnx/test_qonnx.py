import logging
import sys
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitscape.cost.layers import measure
from bitscape.cost.policy_cost import bitops
from bitscape.errors import BitscapeError
from bitscape.exporters.integer.graph import quiet, trace
from bitscape.exporters.onnx.qonnx import save_qonnx, warn_of_zero_points, weight_form
from bitscape.models.attention import split_attention
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.quantizers import Codes, Dorefa, Liq, Lsq, LsqPlus, Pact, PerTensor
from bitscape.quant.quantizers.lsq_plus import LsqPlusActivation
from tests.needs import runtime_or_skip
from tests.networks import basic_block, conv_norm, inverted_residual

pytestmark = pytest.mark.slow

QUANTIZERS = [Lsq(), Lsq(weight_scales=PerTensor()), LsqPlus(), Pact(), Dorefa(), Liq(restore_scale=False)]
FLOAT_BITS = 32
"""qonnx counts what it knows no integers of, the products of attention for instance, as float32."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head(tokens.mean(1))


def convolutions() -> nn.Module:
    """Depthwise ones, sums, norms, both kinds of rectifier."""
    blocks = [inverted_residual(8, 8, 2, 1), basic_block(8, 12, 2)]
    return nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def chain() -> nn.Module:
    """Inputs with values below zero and without."""
    body = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(6, 5))


def smooth() -> nn.Module:
    """Inputs with a short negative tail."""
    body = [nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.SiLU(), nn.Conv2d(6, 6, 1), nn.GELU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


class Every(nn.Module):
    """One chain for each quantizer, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.chains = nn.ModuleList(quantized(build(chain, seed), quantizer) for seed, quantizer in enumerate(QUANTIZERS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([chain(x) for chain in self.chains])

    def quantizer_of(self, layer: str) -> object:
        return QUANTIZERS[int(layer.split(".")[1])]


NETWORKS = [convolutions, Attention]


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def build(make, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    model.train()(images(16))  # norms with statistics of their own
    return split_attention(model.eval())


def mixed_policy(model: nn.Module) -> Policy:
    """Widths 1..8 for weights and for activations, every layer another pair."""
    names = enumerate(layer_shapes(model))
    return Policy({name: LayerBits(1 + 3 * index % 8, 8 - 5 * index % 8) for index, name in names})


def quantized(model: nn.Module, quantizer=QUANTIZERS[0]) -> nn.Module:
    return calibrate(with_quantizers(model, mixed_policy(model), quantizer), images())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Builds, quantizes and exports a network once: an export takes seconds."""
    pytest.importorskip("onnxscript", reason="pip install 'bitscape[onnx]'")

    @cache
    def export(make) -> SimpleNamespace:
        model = build(make)
        network = model if make is Every else quantized(model)
        info = save_qonnx(network, tmp_path_factory.mktemp("qonnx") / "net.onnx", images())
        return SimpleNamespace(model=model, network=network, info=info)

    return export


@pytest.fixture
def qonnx(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Loads, executes and counts. qonnx 1.0 wraps single nodes in models of onnx's newest IR version, which ONNX Runtime refuses."""
    runtime_or_skip("onnxruntime")
    execution = pytest.importorskip("qonnx.core.onnx_exec", reason="qonnx is the reference for QONNX files: pip install qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.inference_cost import inference_cost

    monkeypatch.setattr(execution, "qonnx_make_model", partial(execution.qonnx_make_model, ir_version=10))

    def execute(model, image: Tensor) -> dict[str, np.ndarray]:
        with quiet():
            return execution.execute_onnx(model, {model.graph.input[0].name: image.numpy()}, return_full_exec_context=True)

    def cost(model) -> dict[str, float]:
        with quiet():
            return inference_cost(model, discount_sparsity=False)["total_cost"]

    return SimpleNamespace(load=lambda path: ModelWrapper(str(path)), execute=execute, cost=cost)


def quant_nodes(model) -> dict[str, tuple]:
    """Layer -> its Quant nodes, of the weight and of the input."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in made_by:
            weight = made_by[node.input[1]]
            weight = made_by[weight.input[0]] if weight.op_type == "Transpose" and weight.input[0] in made_by else weight
            if weight.op_type == "Quant":
                found[weight.input[0].removesuffix(".weight")] = (weight, made_by[node.input[0]])
    return found


@torch.no_grad()
def outputs_and_layer_inputs(network: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.input_quantizer.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y))
        for name, layer in quantized_layers(network).items()
    ]
    output = network(image)
    for hook in hooks:
        hook.remove()
    return output, seen


@pytest.mark.parametrize("make", NETWORKS)
def test_qonnx_computes_the_same_codes_everywhere_and_the_outputs_up_to_float_rounding(make, exported, qonnx):
    network, info = exported(make).network, exported(make).info
    model = qonnx.load(info.path)
    layers, nodes = quantized_layers(network), quant_nodes(model)
    assert nodes.keys() == layers.keys()
    for image in images(2).split(1):
        values = qonnx.execute(model, image)
        expected, inputs = outputs_and_layer_inputs(network, image)
        torch.testing.assert_close(torch.tensor(values[model.graph.output[0].name]), expected, rtol=1e-5, atol=1e-6)
        for name, (weight, activation) in nodes.items():
            assert torch.equal(torch.tensor(values[weight.output[0]]), layers[name].weight_quantizer(layers[name].weight))
            assert torch.equal(torch.tensor(values[activation.output[0]]), inputs[name])


@pytest.mark.parametrize("make", NETWORKS)
def test_qonnx_counts_the_bitops_macs_and_weight_bits_that_we_do(make, exported, qonnx):
    model, info = exported(make).model, exported(make).info
    cost, policy, counted = measure(model, (3, 16, 16)), mixed_policy(model), qonnx.cost(qonnx.load(info.path))
    products = sum(entry.macs for entry in cost.uncounted)  # of two activations: no layer's for us, float32 for qonnx
    assert counted["total_bops"] == bitops(cost, policy) + products * FLOAT_BITS**2
    assert counted["total_macs"] == cost.covered_macs + products
    assert counted["total_mem_w_bits"] == sum(layer.weights * policy.layers[layer.name].weight for layer in cost.layers)
    assert (info.bitops, info.weight_bits) == (bitops(cost, policy), counted["total_mem_w_bits"])
    pairs = {f"op_mac_SCALEDINT<{activation}>_SCALEDINT<{weight}>": macs for (weight, activation), macs in info.macs.items()}
    assert {key: macs for key, macs in counted.items() if key.startswith("op_mac_SCALEDINT")} == pairs


def test_attention_has_products_that_are_no_layers():
    products = sum(entry.macs for entry in measure(build(Attention), (3, 16, 16)).uncounted)
    assert products == 2 * 16 * 16 * 8  # tokens times tokens times width, of queries with keys and of weights with values


@pytest.mark.parametrize("make", [Every, smooth])
def test_every_quantizer_is_a_node_of_the_same_numbers(make, exported, qonnx):
    network, model = exported(make).network, qonnx.load(exported(make).info.path)
    values, nodes = qonnx.execute(model, images(1)), quant_nodes(model)
    for name, layer in quantized_layers(network).items():
        weight, activation = nodes[name]
        assert torch.equal(torch.tensor(values[weight.output[0]]), layer.weight_quantizer(layer.weight)), name
        # Of the node's own input: what convolutions return differs in the last digits between runtimes.
        expected = layer.input_quantizer(torch.tensor(values[activation.input[0]]))
        # PACT adds the rounding to the clipped value, which costs a last digit.
        of_pact = make is Every and isinstance(network.quantizer_of(name), Pact)
        last_digit = {"rtol": 1e-6, "atol": 1e-7} if of_pact else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(
            torch.tensor(values[activation.output[0]]), expected, **last_digit, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_without_a_zero_one_bit_more_is_counted_and_with_a_zero_point_float(exported, qonnx):
    network, info = exported(Every).network, exported(Every).info
    layers, counted = measure(network, (3, 16, 16)).layers, qonnx.cost(qonnx.load(info.path))
    bits = {name: static_bits(layer) for name, layer in quantized_layers(network).items()}
    mid_rise = {name for name in bits if isinstance(network.quantizer_of(name), Dorefa | Pact | Liq)}
    wider = {name: (b.weight + (b.weight > 1 and name in mid_rise), b.activation) for name, b in bits.items()}
    assert info.bits == wider
    assert info.weight_bits == counted["total_mem_w_bits"] == sum(layer.weights * wider[layer.name][0] for layer in layers)
    assert info.bitops == sum(layer.macs * wider[layer.name][0] * wider[layer.name][1] for layer in layers)
    inputs = {name: layer.input_quantizer for name, layer in quantized_layers(network).items()}
    shifted = {name for name, own in inputs.items() if isinstance(own, LsqPlusActivation) or own.lowest is not None}
    in_qonnx = {name: (w, FLOAT_BITS if name in shifted else a) for name, (w, a) in wider.items()}
    assert counted["total_bops"] == sum(layer.macs * in_qonnx[layer.name][0] * in_qonnx[layer.name][1] for layer in layers)


@pytest.mark.parametrize("weight_bits", range(1, 9))
@pytest.mark.parametrize("zero_point", [0.0, -0.5])
def test_a_node_of_any_width_leaves_every_level_of_a_weight_as_it_is(weight_bits, zero_point, qonnx):
    from qonnx.custom_op.general.intquant import int_quant

    if weight_bits == 1 and zero_point == 0:
        return  # one signed bit is a sign
    q = torch.arange(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), dtype=torch.int8)
    codes = Codes(q[:, None], torch.linspace(0.003, 0.7, len(q))[:, None], zero_point)
    form = weight_form(codes, weight_bits)
    levels = codes.dequantize().numpy()
    same = int_quant(levels, form.scale.numpy(), np.float32(0), np.array(form.bits, np.float32), 1, int(form.narrow), "ROUND")
    np.testing.assert_array_equal(same, levels)


def test_nodes_say_what_the_quantizers_are(exported, qonnx):
    model = qonnx.load(exported(convolutions).info.path)

    def facts(node) -> tuple:
        scale, zero_point, bits = (model.get_initializer(name) for name in node.input[1:])
        attributes = {a.name: a.s.decode() if a.s else a.i for a in node.attribute}
        return scale.shape, zero_point, bits, attributes["signed"], attributes["narrow"], attributes["rounding_mode"]

    nodes = quant_nodes(model)
    assert {node.domain for pair in nodes.values() for node in pair} == {"qonnx.custom_op.general"}
    assert [facts(node) for node in nodes["0"]] == [((8, 1, 1, 1), 0, 1, 1, 0, "ROUND"), ((), 0, 8, 1, 0, "ROUND")]
    assert [facts(node) for node in nodes["7"]] == [((5, 1), 0, 6, 1, 0, "ROUND"), ((), 0, 5, 0, 0, "ROUND")]
    learned = exported(convolutions).network[0].weight_quantizer.scale.detach()
    np.testing.assert_array_equal(model.get_initializer(nodes["0"][0].input[1]), learned / 2)  # -1 and 1 instead of -1/2 and 1/2


def test_norms_stay_and_the_batch_is_one_image(exported, qonnx):
    network, info = exported(convolutions).network, exported(convolutions).info
    model = qonnx.load(info.path)
    assert model.get_tensor_shape(model.graph.input[0].name) == [1, 3, 16, 16]
    assert len(model.get_nodes_by_op_type("BatchNormalization")) == sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert len(model.get_nodes_by_op_type("Quant")) == 2 * len(quantized_layers(network))
    assert model.model.ir_version <= 13
    assert info.file_bytes == info.path.stat().st_size
    assert b".py" not in info.path.read_bytes()  # nothing of where it was made


def test_the_cleaned_file_computes_the_same(exported, qonnx):
    from qonnx.util.cleanup import cleanup_model  # what FINN and hls4ml begin with

    model = qonnx.load(exported(Attention).info.path)
    expected = qonnx.execute(model, images(1))[model.graph.output[0].name]
    with quiet():
        cleaned = cleanup_model(model)
    np.testing.assert_array_equal(qonnx.execute(cleaned, images(1))[cleaned.graph.output[0].name], expected)


def test_zero_points_that_finn_refuses_are_told(caplog):
    traced = trace(quantized(build(chain), LsqPlus()), images())
    with caplog.at_level(logging.WARNING, logger="bitscape"):
        warn_of_zero_points(traced)
    assert "4 of 4 activation grids have a zero point: hls4ml takes it, FINN does not" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="bitscape"):
        warn_of_zero_points(trace(quantized(build(smooth)), images()))
        assert "2 of 4 activation grids have a zero point" in caplog.text
        caplog.clear()
        warn_of_zero_points(trace(quantized(build(smooth), Lsq(zero_points=False)), images()))
        assert not caplog.text


def test_a_missing_package_a_missing_scale_and_a_float_network_are_errors(monkeypatch, tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(BitscapeError, match="no quantized layer"):
        save_qonnx(build(chain), path, images())
    uncalibrated = with_quantizers(build(chain), mixed_policy(build(chain)))
    with pytest.raises(BitscapeError, match=r"layer 0: its input scale is not set: call bitscape\.quantize"):
        save_qonnx(uncalibrated, path, images())
    with pytest.raises(BitscapeError, match="give two at least"):
        save_qonnx(quantized(build(chain)), path, images(1))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BitscapeError, match=r"pip install 'bitscape\[onnx\]'"):
        save_qonnx(quantized(build(chain)), path, images())
    assert not path.exists()
