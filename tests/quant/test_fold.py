import copy

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import bypassed, calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.quantizers import Dorefa, Lsq, PerTensor
from tests.networks import Residual, conv_norm, mobilenetv2, resnet20


def with_statistics(model: nn.Module, *, positive: bool = False) -> nn.Module:
    """Norms as after training: shifted, scaled, some gammas negative unless `positive`."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
            if norm.affine:
                norm.weight.data.uniform_(0.1 if positive else -0.5, 1.5, generator=generator)
                norm.bias.data.normal_(generator=generator)
    return model.eval()


def norms_of(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def assert_folded(model: nn.Module, example: torch.Tensor, *, left: int = 0) -> nn.Module:
    before = model(example)
    folded = fold_norms(model, example)
    assert norms_of(folded) == left
    torch.testing.assert_close(folded(example), before, atol=1e-4 * float(before.detach().abs().max()), rtol=1e-4)
    return folded


@pytest.mark.parametrize("build", [resnet20, mobilenetv2])
def test_whole_networks_keep_their_output(build):
    torch.manual_seed(0)
    assert_folded(with_statistics(build()), torch.randn(2, 3, 32, 32))


def test_one_dimension_linear_bias_and_norms_without_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, affine=False), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(24, 5, bias=False), nn.BatchNorm1d(5),
    )  # fmt: skip
    folded = assert_folded(with_statistics(model), torch.randn(3, 2, 8))
    assert folded[4].bias is not None


def test_a_network_with_its_original_is_untouched_unless_inplace():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    state = copy.deepcopy(model.state_dict())
    example = torch.randn(1, 3, 4, 4)
    fold_norms(model, example)
    assert norms_of(model) == 1
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert fold_norms(model, example, inplace=True) is model
    assert norms_of(model) == 0


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Twice(Shortcut):
    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
        self[2].weight = self[0].weight


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize(
    "build",
    [
        Shortcut,
        Twice,
        Tied,
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        lambda: nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm2d(3)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ],
)
def test_norms_that_cannot_be_folded_stay(build):
    torch.manual_seed(0)
    assert_folded(with_statistics_or_none(build()), torch.randn(2, 3, 4, 4), left=1)


def with_statistics_or_none(model: nn.Module) -> nn.Module:
    tracked = all(m.running_mean is not None for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    return with_statistics(model) if tracked else model.eval()


def test_a_hidden_use_is_an_error():
    class Hidden(Shortcut):
        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y.tolist()[0][0][0][0]

    with pytest.raises(BitscapeError, match="hidden way"):
        fold_norms(with_statistics(Hidden()), torch.randn(1, 3, 4, 4))


def small() -> nn.Module:
    body = [*conv_norm(4, 8, 3), nn.ReLU(), *conv_norm(8, 8, 3, groups=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*conv_norm(3, 4, 3), Residual(nn.Identity(), nn.Identity()), *body, nn.Flatten(), nn.Linear(8, 5))


def quantized(model: nn.Module, images: torch.Tensor, bits: int, quantizer=None) -> nn.Module:
    policy = uniform_policy(layer_shapes(model), LayerBits(bits, 8))
    return calibrate(with_quantizers(model, policy, quantizer or Lsq()), images)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantized_networks_fold_exactly(bits):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    model = quantized(with_statistics(small(), positive=True), images, bits)
    folded = fold_norms(model, images)
    assert norms_of(folded) == 0
    with bypassed(model, "input_quantizer"), bypassed(folded, "input_quantizer"):
        before = model(images)
        torch.testing.assert_close(folded(images), before, atol=1e-4 * float(before.detach().abs().max()), rtol=1e-4)
    first, other = model[0], folded[0]
    assert torch.equal(first.weight_quantizer.codes(first.weight).q, other.weight_quantizer.codes(other.weight).q)
    assert torch.equal(other.weight_quantizer(other.weight), other.weight)


def test_negative_gammas_fold_where_the_grid_allows():
    images = torch.randn(4, 3, 5, 5)
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].weight.data.fill_(-0.7)
    model = quantized(model, images, 4)
    scale, row = model[0].weight_quantizer.scale.data, torch.tensor([-7.0, 3.0, 7.0])
    model[0].weight.data.copy_(row[None, :, None, None] * scale)
    folded = fold_norms(model, images)
    assert torch.equal(folded[0].weight_quantizer.codes(folded[0].weight).q[0].flatten(), torch.tensor([7, -3, -7], dtype=torch.int8))
    model[0].weight.data[0, 0] = -8 * scale[0]
    with pytest.raises(BitscapeError, match="1 weights hold the code -8 under a negative gamma"):
        fold_norms(model, images)


@pytest.mark.parametrize(("quantizer", "message"), [(Dorefa(), "DorefaWeight"), (Lsq(weight_scales=PerTensor()), "one per output channel")])
def test_other_quantizers_are_refused(quantizer, message):
    images = torch.randn(4, 3, 5, 5)
    model = quantized(with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), images, 4, quantizer)
    with pytest.raises(BitscapeError, match=message):
        fold_norms(model, images)


def test_a_dead_channel_folds_and_too_small_a_scale_does_not():
    images = torch.randn(4, 3, 5, 5)
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), positive=True)
    model[1].weight.data[0] = 0.0
    model = quantized(model, images, 4)
    assert (fold_norms(model, images)[0].weight[0] == 0).all()
    model[1].weight.data[0] = 1e-35
    with pytest.raises(BitscapeError, match=r"below 7\.88861e-31"):
        fold_norms(model, images)


def test_a_network_that_autocasts_within_its_forward_is_folded():
    class Autocasting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
            self.body = with_statistics(nn.Sequential(*layers))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x).float()

    images, model = torch.randn(4, 3, 9, 9), Autocasting()
    folded = fold_norms(model, images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        expected = model.body(images)  # in float32
        torch.testing.assert_close(folded.body(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, x: (model.bfloat16(), x), r"the network must be float32: call model\.float\(\) first"),
        (lambda model, x: (model, x.double()), r"example: torch\.float64; give a float32 tensor"),
        (lambda model, x: (model, x[:0]), r"example: shape \(0, 3, 9, 9\); give at least one image"),
        (lambda model, x: (model, x[:, :2]), r"fails on a batch of shape .* check channels"),
        (lambda model, x: (model, x.fill_(torch.nan)), "the network's outputs on it hold NaN"),
    ],
)
def test_what_the_example_or_the_network_lacks_is_named(change, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(BitscapeError, match=message):
        fold_norms(*change(model, torch.zeros(2, 3, 9, 9)))


def test_a_caller_that_autocasts_changes_nothing():
    model, images = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        folded = fold_norms(model, images)
    assert torch.equal(folded[0].weight, fold_norms(model, images)[0].weight)


def test_outputs_that_are_classes_or_answers_must_be_equal():
    class Detecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(392, 5)))

        def forward(self, x):
            logits = self.body(x)
            return {"classes": logits.argmax(1), "sure": logits.amax(1) > 0, "logits": logits}

    model, images = Detecting(), torch.randn(4, 3, 9, 9)
    folded, expected = fold_norms(model, images), model(images)
    assert isinstance(folded.body[1], nn.Identity)
    outputs = folded(images)
    assert torch.equal(outputs["classes"], expected["classes"]) and torch.equal(outputs["sure"], expected["sure"])
    torch.testing.assert_close(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


def test_outputs_may_be_infinite_where_a_mask_is():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]).reshape(4, 1, 1))

        def forward(self, x):
            return self.body(x) + self.mask

    model, images = Masked().eval(), torch.randn(2, 3, 5, 5)
    folded = fold_norms(model, images)
    assert isinstance(folded.body[1], nn.Identity)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
