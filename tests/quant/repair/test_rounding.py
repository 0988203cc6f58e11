import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import bypassed, calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, PerChannel, PerTensor
from bitscape.quant.repair import adaptive_rounding, compensate_rounding, input_moments
from bitscape.quant.repair.rounding import SHRINKAGES, RoundingTask, compensations, rounding_tasks, shrunk

pytestmark = pytest.mark.slow

SETTINGS = [Lsq(), Lsq(weight_scales=PerTensor()), Lsq(weight_scales=PerChannel(1)), LsqPlus()]
ROUNDINGS = [compensate_rounding, lambda m, x: adaptive_rounding(m, x, steps=200)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6),
    ).eval()  # fmt: skip


def correlated(n: int) -> torch.Tensor:
    """Smooth images: neighbours alike, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    return nn.functional.interpolate(torch.randn(n, 3, 4, 4, generator=generator), size=12, mode="bilinear")


def quantized(model: nn.Module, bits: int, quantizer=None) -> nn.Module:
    policy = uniform_policy(layer_shapes(model), LayerBits(bits, 8))
    return calibrate(with_quantizers(model, policy, quantizer or Lsq()), correlated(16))


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=["compensate", "adaptive"])
@pytest.mark.parametrize("quantizer", SETTINGS, ids=["channel", "tensor", "inputs", "plus"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_weights_lie_on_the_grid_and_errors_fall(rounding, quantizer, bits):
    model = network()
    moments = input_moments(model, correlated(32))
    repaired = quantized(model, bits, quantizer)
    scales = {n: layer.weight_quantizer.scale.detach().clone() for n, layer in quantized_layers(repaired).items()}
    errors = rounding(repaired, moments)
    for name, layer in quantized_layers(repaired).items():
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
        assert torch.equal(layer.weight_quantizer.codes(layer.weight).dequantize(), layer.weight)
        assert torch.equal(layer.weight_quantizer.scale, scales[name])
    assert list(errors) == list(layer_shapes(model))
    assert sum(e.repaired for e in errors.values()) < sum(e.nearest for e in errors.values())


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=["compensate", "adaptive"])
def test_reported_errors_are_those_of_the_layer_on_the_images(rounding):
    model, images = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False)), correlated(32)
    repaired = quantized(model, 2)
    with bypassed(repaired, "input_quantizer"), torch.no_grad():
        target = model(images)

        def error() -> float:
            return float((repaired(images) - target).square().sum() / target.square().sum())

        before = error()
        reported = rounding(repaired, input_moments(model, images))["0"]
        assert reported.nearest == pytest.approx(before, rel=1e-3)
        assert reported.repaired == pytest.approx(error(), rel=1e-3)
    assert reported.repaired < 0.9 * reported.nearest


def test_it_lies_between_the_best_of_all_choices_and_nearest_rounding():
    torch.manual_seed(0)
    inputs = torch.randn(64, 2) @ torch.randn(2, 6) + 0.1 * torch.randn(64, 6)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    repaired = with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(2, 8)))
    moments = input_moments(model, inputs)
    task = rounding_tasks(repaired, moments)["0"]()
    best = torch.full((1, 8), torch.inf)
    for choice in itertools.product(range(-2, 2), repeat=6):
        codes = torch.tensor(choice, dtype=torch.float32).expand_as(task.weight)
        best = torch.minimum(best, task.output_error(task.real(codes) - task.weight))
    total = task.output_error(task.weight).sum()
    errors = compensate_rounding(repaired, moments)["0"]
    assert float(best.sum() / total) <= errors.repaired + 1e-6
    assert errors.repaired < 0.3 * errors.nearest


def test_moments_of_few_samples_shrink_towards_their_diagonal():
    moments = torch.tensor([[[4.0, 2.0], [2.0, 8.0]]])
    # two weights a row, two samples: half of what lies beside the diagonal stays
    expected = torch.tensor([[[4.0, 1.0], [1.0, 8.0]]])
    torch.testing.assert_close(shrunk(moments, samples=2, shrinkage=1.0), expected)
    assert torch.allclose(shrunk(moments, samples=10**9, shrinkage=1.0), moments)


def test_the_method_is_judged_on_the_other_part_of_the_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16, bias=False))

    def best(inputs: torch.Tensor) -> object:
        moments = input_moments(model, list(inputs.split(len(inputs) // 2)))
        quantized = with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(3, 8)))
        methods = compensations()
        return methods.index(rounding_tasks(quantized, moments)["0"]().best(methods))

    mixing = torch.randn(4, 64)
    alike = torch.randn(512, 4) @ mixing + 0.1 * torch.randn(512, 64)
    assert best(alike) < len(SHRINKAGES)
    # What cancels in the first part adds up in the second.
    signs = torch.cat([torch.ones(32), -torch.ones(32)])
    first = torch.randn(4096, 1) + 0.01 * torch.randn(4096, 64)
    assert compensations()[-1] is RoundingTask.nearest
    assert best(torch.cat([first, first * signs])) == len(SHRINKAGES)


def test_a_fitted_scale_is_the_best_one_for_its_codes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    quantized = with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(3, 8)))
    task = rounding_tasks(quantized, input_moments(model, torch.randn(64, 6)))["0"]()
    codes = task.nearest()
    fitted = task.fitted(codes)
    error = fitted.error(codes)
    assert error < task.error(codes)
    for factor in (0.99, 1.01):
        assert error < replace(fitted, scale=fitted.scale * factor).error(codes)


def test_blocks_do_not_change_the_codes():
    model = network()
    moments = input_moments(model, correlated(32))
    one, many = quantized(model, 3), quantized(model, 3)
    compensate_rounding(one, moments, block=1)
    compensate_rounding(many, moments, block=1000)
    for a, b in zip(quantized_layers(one).values(), quantized_layers(many).values(), strict=True):
        assert torch.equal(a.weight, b.weight)


def test_inputs_that_are_always_zero_or_alike_break_nothing():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    moments = input_moments(model, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    repaired = with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(3, 8)))
    nearest = repaired[1].weight_quantizer(repaired[1].weight).detach().clone()
    compensate_rounding(repaired, moments)
    assert torch.equal(repaired[1].weight, nearest)
    assert torch.isfinite(repaired[0].weight).all()


def test_either_order_helps():
    model = network()
    moments = input_moments(model, correlated(32))
    for order in (True, False):
        errors = compensate_rounding(quantized(model, 3), moments, activation_order=order)
        assert sum(e.repaired for e in errors.values()) < sum(e.nearest for e in errors.values())


def test_layers_without_moments_keep_nearest_rounding():
    model = network()
    moments = input_moments(model, correlated(8))
    del moments["2"]
    repaired = quantized(model, 3)
    before = copy.deepcopy(repaired)
    assert "2" not in compensate_rounding(repaired, moments)
    assert torch.equal(before[2].weight, repaired[2].weight)


@pytest.mark.parametrize("rounding", [compensate_rounding, adaptive_rounding])
def test_wrong_input_is_refused_with_the_next_step(rounding):
    model = network()
    moments = input_moments(model, correlated(4))
    with pytest.raises(BitscapeError, match="no quantized layer; call"):
        rounding(model, moments)
    for other in (Dorefa(), Liq()):
        with pytest.raises(BitscapeError, match=r"layer 0: its weight quantizer is .*Weight"):
            rounding(quantized(model, 3, other), moments)
    with pytest.raises(BitscapeError, match="moments: no quantized layer '99'"):
        rounding(quantized(model, 3), {**moments, "99": moments["0"]})
    with pytest.raises(BitscapeError, match="moments: layer 0 has weights"):
        rounding(quantized(model, 3), {"0": moments["2"]})


def test_settings_out_of_range_are_refused():
    model = network()
    repaired, moments = quantized(model, 3), input_moments(model, correlated(4))
    with pytest.raises(BitscapeError, match="damping = 0"):
        compensate_rounding(repaired, moments, damping=0)
    with pytest.raises(BitscapeError, match="steps = 0"):
        adaptive_rounding(repaired, moments, steps=0)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=["compensate", "adaptive"])
def test_small_weights_and_inputs_are_repaired_like_large_ones(rounding):
    large, small, x = network(), network(), correlated(32)
    with torch.no_grad():
        for layer in (small[0], small[4]):  # the same function but for the size of what lies between
            layer.weight.mul_(2.0**-30 if layer is small[0] else 2.0**30)
        small[0].bias.mul_(2.0**-30)
        small[2].bias.mul_(2.0**-30)
    errors = []
    for model in (large, small):
        moments = input_moments(model, x)
        errors.append(rounding(quantized(model, 3), moments))
    for name, error in errors[0].items():
        assert errors[1][name].nearest == pytest.approx(error.nearest, rel=1e-3)
        assert errors[1][name].repaired == pytest.approx(error.repaired, rel=1e-2)


def test_moments_are_float32_in_a_network_that_autocasts_within_its_forward():
    class Autocasting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x).float()

    model = Autocasting()
    moments, exact = input_moments(model, correlated(8)), input_moments(model.body, correlated(8))
    for name, expected in exact.items():
        assert moments[f"body.{name}"].mean.dtype == torch.float32
        torch.testing.assert_close(
            moments[f"body.{name}"].mean, expected.mean, rtol=0.05, atol=0.05 * float(expected.mean.max())
        )
