import threading

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.repair import in_order
from bitscape.quant.repair.in_order import corrected_target, map_bytes, round_in_order
from bitscape.quant.repair.rounding import compensations

pytestmark = pytest.mark.slow


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6),
    ).eval()  # fmt: skip


def quantized(model: nn.Module, images: torch.Tensor) -> nn.Module:
    return calibrate(with_quantizers(model, uniform_policy(layer_shapes(model), LayerBits(3, 4))), images)


def rounded(model: nn.Module, images: torch.Tensor, **settings) -> nn.Module:
    network = quantized(model, images)
    round_in_order(network, model, images.split(12), compensations(), **settings)
    return network


def test_a_target_makes_good_what_happened_to_the_inputs():
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(1, 5, 4000, generator=generator)
    weight = torch.randn(1, 3, 5, generator=generator)
    rows = 0.5 * expected  # all inputs came at half their size
    moments, missing = rows @ rows.mT / 4000, (expected - rows) @ rows.mT / 4000
    target = corrected_target(weight, moments, missing, 4000)
    torch.testing.assert_close(target, 2 * weight, rtol=0.05, atol=0.05)
    unmoved = corrected_target(weight, moments, torch.zeros_like(moments), 4000)
    assert torch.equal(unmoved, weight)


def test_few_samples_move_a_target_less():
    weight, moments, missing = torch.ones(1, 1, 4), torch.eye(4)[None], 0.5 * torch.eye(4)[None]
    few, many = (corrected_target(weight, moments, missing, samples) for samples in (4, 10**6))
    # w + 0.5 / (1 + 4 / 4 + 0.01) and w + 0.5 / (1 + 0.01)
    torch.testing.assert_close(few, torch.full((1, 1, 4), 1 + 0.5 / 2.01))
    torch.testing.assert_close(many, torch.full((1, 1, 4), 1 + 0.5 / 1.01))


def test_every_layer_is_rounded_in_the_order_of_the_calls_and_outputs_come_closer():
    model, images = network(), torch.randn(48, 3, 8, 8)
    plain = quantized(model, images)
    repaired = rounded(model, images)
    for layer in quantized_layers(repaired).values():
        torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight)
    with torch.no_grad():
        target = model(images)
        errors = [float((one(images) - target).norm()) for one in (plain, repaired)]
    assert errors[1] < 0.8 * errors[0]


def test_channels_have_their_float_means_when_all_samples_fit():
    model, images = network(), torch.randn(48, 3, 8, 8)
    repaired = rounded(model, images)
    with torch.no_grad():
        torch.testing.assert_close(repaired(images).mean(0), model(images).mean(0), atol=1e-3, rtol=1e-3)


def test_biases_stay_where_nothing_is_corrected():
    model, images = network(), torch.randn(24, 3, 8, 8)
    repaired = rounded(model, images, correct=False)
    for name in layer_shapes(model):
        assert torch.equal(repaired.get_submodule(name).bias, model.get_submodule(name).bias)


def test_batches_that_did_not_fit_at_first_catch_up(monkeypatch):
    model, images = network(), torch.randn(48, 3, 8, 8)
    joined = []
    seen = in_order._Rounder._round

    def watched(self, name, pairs):
        joined.append((name, sum(pair.samples for pair in pairs)))
        seen(self, name, pairs)

    monkeypatch.setattr(in_order._Rounder, "_round", watched)
    sizes = map_bytes(model, layer_shapes(model), images[:2])
    # in float32, in two networks: 3 x 8 x 8 in and 8 x 6 x 6 out; 8 x 6 x 6 in, 8 x 4 x 4 out; 128 in, 6 out
    assert sizes == {"0": 8 * (192 + 288), "2": 8 * (288 + 128), "5": 8 * (128 + 6)}
    monkeypatch.setattr(in_order, "MAP_BYTES", sizes["2"] * 24)
    rounded(model, images)
    # batches of twelve come as eight and four; eight more are admitted while they fit
    assert [name for name, _ in joined] == ["0", "2", "5"]
    assert joined[0][1] < joined[1][1] + 1 <= joined[2][1] + 1
    assert joined[0][1] <= 24
    assert joined[2][1] == 48


def test_shared_weights_and_second_calls_run_through():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(self.first(x).relu()).relu())

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(32, 6)
    repaired = rounded(model, x)
    assert repaired.second.weight is repaired.first.weight
    weight = repaired.first.weight
    assert torch.equal(repaired.first.weight_quantizer(weight), weight)


def test_an_error_in_the_network_ends_every_thread():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fails = nn.Linear(4, 4), False

        def forward(self, x):
            y = self.layer(x)
            if self.fails and len(x) == 3:
                raise RuntimeError("three")
            return y

    model, x = Fails().eval(), torch.randn(8, 4)
    network = quantized(model, x)
    network.fails = True
    before = threading.active_count()
    with pytest.raises((BitscapeError, RuntimeError), match="three"):
        round_in_order(network, model, [x[:5], x[5:]], compensations())
    assert threading.active_count() == before


def test_what_cannot_be_rounded_is_said(caplog):
    class Standardised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)

    model, x = nn.Sequential(Standardised(4, 4), nn.Linear(4, 2)), torch.randn(16, 4)
    rounded(model, x)
    assert "layer 0: nearest rounding" in caplog.text
    with pytest.raises(BitscapeError, match="images: no batch"):
        round_in_order(quantized(model, x), model, [], compensations())
    with pytest.raises(BitscapeError, match=r"layer 1: its inputs, .*not finite"):
        round_in_order(quantized(model, x), model, [x * torch.inf], compensations())


def test_what_a_forward_keeps_in_the_network_belongs_to_its_batch():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            self.kept = x
            y = self.first(x)
            return self.second(y + self.kept)

    class Passes(Keeps):
        def forward(self, x):
            return self.second(self.first(x) + x)

    torch.manual_seed(0)
    keeps, x = Keeps().eval(), torch.randn(32, 4)
    passes = Passes().eval()
    passes.load_state_dict(keeps.state_dict())
    expected, actual = rounded(passes, x).state_dict(), rounded(keeps, x).state_dict()
    for name, value in expected.items():
        assert torch.equal(actual[name], value)


def test_a_float_network_without_the_layer_is_refused():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(16, 4)
    with pytest.raises(BitscapeError, match="float_model: it has no layer '1'"):
        round_in_order(quantized(model, x), model[:1], [x], compensations())
