"""Grids that begin between the signed and the unsigned one, from the values to files."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from bitscape.data.samples import Samples
from bitscape.exporters.integer.form import integer_network
from bitscape.exporters.integer.graph import ActivationGrid, grid_of, is_quantizer
from bitscape.exporters.onnx.qdq import save_onnx
from bitscape.exporters.openvino.ir import save_openvino
from bitscape.exporters.openvino.parity import check_openvino_parity
from bitscape.exporters.packed.file import load_packed, save_packed
from bitscape.exporters.parity import ALLOWED, check_parity
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.functional import fake_quantize
from bitscape.quant.grid import Grid, grid, grid_from
from bitscape.quant.layers import quantized_layers
from bitscape.quant.mixture import Mixture
from bitscape.quant.observers import MinMax, Mse, Percentile, activation_range
from bitscape.quant.quantizers import Lsq
from bitscape.runtimes.sessions import OpenVino
from bitscape.searches.sensitivity import layer_noise
from tests.exporters.networks import Applied, images
from tests.needs import runtime_or_skip


def normal(n: int = 4000) -> torch.Tensor:
    return 2 * torch.randn(n, generator=torch.Generator().manual_seed(0))


SHAPES = {
    "silu": F.silu(normal()),
    "gelu": F.gelu(normal()),
    "hardswish": F.hardswish(normal()),
    "shifted": normal() + 3,
    "below": -normal().abs(),
}


def net() -> nn.Module:
    """Padding, a residual edge, and two layers that read one tensor."""
    torch.manual_seed(0)
    sizes = {"a": (3, 8, 3), "b": (8, 8, 3), "c": (8, 8, 1), "d": (8, 4, 1)}
    layers = {name: nn.Conv2d(*size, padding=size[-1] // 2) for name, size in sizes.items()}

    def forward(net, x):
        x = F.silu(net.a(x))
        x = F.silu(net.b(x) + net.c(x))
        return net.e(F.gelu(net.d(x)).mean((2, 3)))

    return Applied(forward, **layers, e=nn.Linear(4, 5)).eval()


def policy(bits: int) -> Policy:
    return Policy({name: LayerBits(8, bits) for name in "abcde"})


def quantized(bits: int, quantizer: Lsq | None = None) -> nn.Module:
    return calibrate(with_quantizers(net(), policy(bits), quantizer or Lsq()), images())


def squared_error(values, scale, levels) -> float:
    return float((fake_quantize(values, scale, levels) - values).square().sum())


def best_error(values, levels) -> float:
    return squared_error(values, Mse().scale(values[None], levels)[0], levels)


@pytest.mark.parametrize(
    ("lowest", "bits", "expected"),
    [(-3, 4, Grid(-3, 12)), (0, 4, Grid(0, 15)), (-8, 4, Grid(-8, 7)), (-1, 1, Grid(-1, 0, -0.5)), (-255, 8, Grid(-255, 0))],
)
def test_a_grid_holds_2_to_the_bits_levels_from_its_lowest_code_on(lowest, bits, expected):
    assert grid_from(lowest, bits) == expected


@pytest.mark.parametrize("values", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_within_2_percent_of_the_best_of_all_zero_points(values, bits):
    scale, levels = activation_range(values, bits, Mse())
    best = min(best_error(values, grid_from(lowest, bits)) for lowest in range(1 - 2**bits, 1))
    assert squared_error(values, scale, levels) <= 1.02 * best


@pytest.mark.parametrize("observer", [MinMax(), Mse()], ids=repr)
def test_a_short_negative_tail_costs_few_codes(observer):
    scale, levels = activation_range(SHAPES["silu"], 8, observer)
    assert levels == grid_from(int(levels.qmin), 8)
    assert levels.qmin == pytest.approx(float(SHAPES["silu"].min() / scale), abs=4)
    assert squared_error(SHAPES["silu"], scale, levels) < 0.4 * best_error(SHAPES["silu"], grid(8, signed=True))


def test_symmetric_and_positive_values_keep_plain_grids():
    for bits in (1, 2, 4, 8):
        assert activation_range(normal(), bits, Mse())[1] == grid(bits, signed=True)
        assert activation_range(normal().abs(), bits, Mse())[1] == grid(bits, signed=False)
    assert activation_range(SHAPES["silu"], 4, Mse(), zero_points=False)[1] == grid(4, signed=True)


@pytest.mark.parametrize("power", [-80, 60])
def test_small_and_large_values_get_the_range_of_their_size(power):
    scale, levels = activation_range(SHAPES["silu"], 4, Mse())
    other, same = activation_range(SHAPES["silu"] * 2.0**power, 4, Mse())
    assert same == levels and other == scale * 2.0**power


@pytest.mark.parametrize("observer", [MinMax(), Percentile(), Mse()], ids=repr)
@pytest.mark.parametrize("value", [-3.0, -1e-30])
def test_constant_values_lie_on_the_grid(observer, value):
    scale, levels = activation_range(torch.full((9,), value), 4, observer)
    torch.testing.assert_close(fake_quantize(torch.full((9,), value), scale, levels), torch.full((9,), value))


def test_zero_stays_zero_and_the_state_dict_carries_the_grid():
    fake, fresh = Lsq().for_activation(4), Lsq().for_activation(4)
    fake.initialize(SHAPES["silu"], Mse())
    assert (fake.signed, fake.lowest, fake.grid) == (True, -1, Grid(-1, 14)) and "bits=4, from -1" in repr(fake)
    assert fake(torch.zeros(3)).tolist() == [0.0] * 3
    fresh.load_state_dict(safetensors.torch.load(safetensors.torch.save(fake.state_dict())))
    assert fresh.grid == fake.grid and torch.equal(fresh(SHAPES["silu"]), fake(SHAPES["silu"]))
    fake.initialize(SHAPES["silu"].abs(), Mse())
    assert (fake.signed, fake.lowest) == (False, None)


def test_searches_score_the_grids_that_layers_get():
    candidates = tuple(LayerBits(8, bits) for bits in (2, 4, 8))
    noise = layer_noise(net(), list("abcde"), Samples.of(images()), candidates)
    for bits in (2, 4, 8):
        for name, layer in quantized_layers(quantized(bits)).items():
            scale, levels = noise[name].ranges[bits]
            own = layer.input_quantizer
            assert (float(scale), levels) == (float(own.scale.detach()), own.grid)


def test_layers_that_read_one_tensor_share_its_grid():
    layers, large = quantized_layers(quantized(8)), images(64, 32)
    assert layers["b"].input_quantizer.lowest < 0
    recalibrated = quantized_layers(calibrate(quantized(8), large))  # more values than are kept
    for found in (layers, recalibrated):
        first, second = found["b"].input_quantizer, found["c"].input_quantizer
        assert first.grid == second.grid and torch.equal(first.scale, second.scale)


def test_every_width_of_a_mixture_has_a_zero_point_of_its_own():
    mixture, fresh = (Mixture((1, 2, 4, 8), signed=False) for _ in range(2))
    mixture.initialize(SHAPES["silu"], Mse())
    ranges = [activation_range(SHAPES["silu"], bits, Mse()) for bits in mixture.widths]
    assert mixture.grids == tuple(levels for _, levels in ranges)
    assert mixture.scale.tolist() == [float(scale) for scale, _ in ranges]
    fresh.load_state_dict(mixture.state_dict())
    assert fresh.grids == mixture.grids


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_files_and_the_integer_form_compute_the_same(bits, tmp_path):
    network = quantized(bits)
    save_packed(network, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(tmp_path / "net.safetensors", net())(images()), network(images()))
    integer = integer_network(network, images())
    kept = {grid_of(node).scale: grid_of(node) for node in integer.module.graph.nodes if is_quantizer(node)}
    own = quantized_layers(network)["d"].input_quantizer  # alone behind its tensor
    lowest, shift = own.lowest, 128 if bits == 4 else -own.lowest
    limits = {"qmin": lowest + shift, "qmax": lowest + 2**bits - 1 + shift}
    assert kept[own.scale.item()] == ActivationGrid(scale=own.scale.item(), zero_point=shift, **limits)
    assert {added.zero_point for added in integer.added.values()} != {128.0}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_runtimes_compute_what_the_integers_say(bits, tmp_path):
    runtime_or_skip("onnxruntime")
    save_onnx(quantized(bits), tmp_path / "net.onnx", images())
    report = check_parity(tmp_path / "net.onnx", images().numpy())
    report.require(ALLOWED["onnxruntime"])
    assert {layer.name for layer in report.layers} == set("abcde")
    runtime_or_skip("openvino")
    info = save_openvino(quantized(bits), tmp_path / "net.xml", images())
    report = check_openvino_parity(tmp_path / "net.xml", info.source, images().numpy(), OpenVino())
    report.require(ALLOWED["openvino"])
    assert report.codes > 0
