import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.repair import repair
from recipes.networks import WEIGHTS, load

pytestmark = pytest.mark.slow


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 6)).eval()


def quantized(model: nn.Module, images: torch.Tensor, bits: int = 3) -> nn.Module:
    return calibrate(with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(bits, 8))), images)


@pytest.mark.parametrize("rounding", ["compensate", "adaptive", None])
@pytest.mark.parametrize("bias", [True, False])
def test_every_combination_lowers_the_error_and_no_combination_changes_nothing(rounding, bias):
    model, images = network(), torch.randn(48, 3, 8, 8)
    target = model(images)
    plain = quantized(model, images)
    error = (plain(images) - target).norm()
    repaired = repair(plain, model, iter(images.split(16)), rounding=rounding, bias=bias)
    assert repaired is plain
    after = (repaired(images) - target).norm()
    assert after < error if rounding or bias else after == error


def test_steps_are_logged(caplog):
    model, images = network(), torch.randn(48, 3, 8, 8)
    with caplog.at_level("INFO", logger="bitscape.quant.repair"):
        repair(quantized(model, images), model, images)
    assert "compensated rounding of 2 layers" in caplog.text
    assert "outputs of 2 layers corrected" in caplog.text


def test_an_unknown_rounding_is_refused():
    model, images = network(), torch.randn(4, 3, 8, 8)
    with pytest.raises(BitscapeError, match=r"rounding = 'compensat'.*nearest: compensate"):
        repair(quantized(model, images), model, images, rounding="compensat")


def test_a_trained_network_comes_closer_to_its_float_output(shared_data):
    from bitscape.data.sources import load_dataset

    model = load("wrn16_1_kc", shared_data)
    images = WEIGHTS["wrn16_1_kc"].normalization.apply(load_dataset(str(shared_data / "cifar10_test.parquet"), limit=96).images)
    plain, repaired = (quantized(model, images[:64], 4) for _ in range(2))
    repair(repaired, model, images[:64])
    with torch.no_grad():
        target = model(images[64:])
        errors = [float((net(images[64:]) - target).norm() / target.norm()) for net in (plain, repaired)]
    assert errors[1] < 0.8 * errors[0]
