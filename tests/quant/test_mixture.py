import copy

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.functional import fake_quantize, mixed
from bitscape.quant.grid import grid
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.mixture import Mixture, mix
from bitscape.quant.observers import Mse
from bitscape.quant.quantizers import Lsq
from bitscape.quant.quantizers.lsq import lsq_gradient_factor
from tests import formulas

WIDTHS = (1, 2, 4, 8)
INPUTS = {
    "plain": lambda: normal(5, 3, 4, 4),
    "one": lambda: normal(1, 1),
    "channels_last": lambda: normal(5, 3, 4, 6).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: normal(7, 9).T,
    "every second": lambda: normal(6, 5, 8)[:, :, ::2],
    "part of a tensor": lambda: normal(9, 3, 4, 4)[2:7],
    "expanded": lambda: normal(1, 5).expand(4, 5),
    "several pieces": lambda: normal(5, 3, 70, 70),
    "pieces, channels_last": lambda: normal(4, 3, 80, 80).contiguous(memory_format=torch.channels_last),
    "vectors": lambda: normal(3, 6, 5),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(x, signed, per_channel):
    """A share, a scale (near the range of `x`, not on a bound), a grid and a gradient factor for each of the widths."""
    grids = [grid(bits, signed=signed) for bits in WIDTHS]
    scale = torch.tensor([2.0 / max(0.5, limits.qmax) for limits in grids]) * 0.731
    if per_channel:
        scale = scale[:, None] * (1 + 0.1 * normal(len(x)).abs())
        scale = scale.reshape(*scale.shape, *[1] * (x.ndim - 1))
    return scale, normal(len(WIDTHS), seed=2).softmax(0), grids, [0.5, 0.25, 2.0, 1.0]


def plain(x, scale, shares, grids, factors):
    """The formula of the paper on autograd's own operators: gradients of scales are those of fake_quantize times the factor."""
    each = zip(shares, scale, grids, factors, strict=True)
    return sum(share * formulas.fake_quantize(x, one, levels, f) for share, one, levels, f in each)


def gradients(function, upstream, *inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return y, torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_values_and_gradients_are_those_of_the_plain_formula(name, per_channel, signed):
    x = INPUTS[name]()
    scale, shares, grids, factors = case(x, signed, per_channel)
    parts = [share * fake_quantize(x, one, levels) for share, one, levels in zip(shares, scale, grids, strict=True)]
    torch.testing.assert_close(mixed(x, scale, shares, grids, factors), sum(parts))

    upstream = normal(*x.shape, seed=3)
    y, found = gradients(lambda *leaves: mixed(*leaves, grids, factors), upstream, x, scale, shares)
    y_plain, expected = gradients(lambda *leaves: plain(*leaves, grids, factors), upstream, x, scale, shares)
    torch.testing.assert_close(y, y_plain)
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):  # sums of up to 77,000 terms of either sign
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_view_gives_what_a_copy_does_and_the_layout_is_kept(layout):
    x = normal(4, 6, 5, 5).contiguous(memory_format=layout)
    scale, shares, grids, factors = case(x, True, False)
    y = mixed(x, scale, shares, grids, factors)
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(mixed(x[1:3], scale, shares, grids, factors), y[1:3])
    assert torch.equal(mixed(x[:, ::2], scale, shares, grids, factors), y[:, ::2])


@pytest.mark.parametrize("upstream", ["transposed", "expanded"])
def test_a_gradient_of_another_layout_counts_by_place(upstream):
    x = normal(6, 6)
    g = normal(6, 6, seed=5).T if upstream == "transposed" else normal(6, 1, seed=5).expand(6, 6)
    scale, shares, grids, factors = case(x, True, False)
    _, found = gradients(lambda *leaves: mixed(*leaves, grids, factors), g, x, scale, shares)
    _, expected = gradients(lambda *leaves: mixed(*leaves, grids, factors), g.clone().contiguous(), x, scale, shares)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("at", range(len(WIDTHS)))
def test_the_whole_share_is_that_candidate_bit_for_bit(at, per_channel, signed):
    x = normal(5, 3, 8, 8)
    scale, _, grids, factors = case(x, signed, per_channel)
    shares = nn.functional.one_hot(torch.tensor(at), len(WIDTHS)).float()
    assert torch.equal(mixed(x, scale, shares, grids, factors), fake_quantize(x, scale[at], grids[at]))
    g = normal(5, 3, 8, 8, seed=3)
    _, (g_x, g_scale, _) = gradients(lambda *leaves: mixed(*leaves, grids, factors), g, x, scale, shares)
    _, (own_x, own_scale) = gradients(lambda x, s: fake_quantize(x, s, grids[at], scale_gradient_factor=factors[at]), g, x, scale[at])
    assert torch.equal(g_x, own_x)
    torch.testing.assert_close(g_scale[at], own_scale, rtol=1e-3, atol=1e-3)
    assert not torch.cat([g_scale[:at], g_scale[at + 1 :]]).any()


@pytest.mark.parametrize("per_channel", [False, True])
def test_bfloat16_gradients_of_scales_and_shares_are_summed_in_float32(per_channel):
    x, g = (normal(64, 40, 8, seed=seed).bfloat16() for seed in (0, 3))
    scale, shares, grids, factors = case(x, False, per_channel)
    scale = torch.exp2(scale.log2().round())  # powers of 2, so that bfloat16 has the same codes
    y, (g_x, *found) = gradients(lambda *leaves: mixed(*leaves, grids, factors), g, x, scale, shares)
    exact, (exact_x, *expected) = gradients(lambda *leaves: mixed(*leaves, grids, factors), g.float(), x.float(), scale, shares)
    assert y.dtype == g_x.dtype == torch.bfloat16 and all(each.dtype == torch.float32 for each in found)
    torch.testing.assert_close(y.float(), exact, rtol=2**-6, atol=1e-6)  # a rounding for each candidate
    torch.testing.assert_close(g_x.float(), exact_x, rtol=2**-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [(4,), (2, 4), (1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("channels", [None, 8])
def test_the_input_alone_is_saved_whatever_the_number_of_candidates(widths, channels):
    mixture = Mixture(widths, signed=True, channels=channels)
    x = normal(8, 4, 16, 16).requires_grad_()
    mixture.initialize(x, Mse())
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixture(x)
    large = [tensor for tensor in saved if tensor.numel() > 8 * len(widths)]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_form_for_compilers_has_the_same_values_and_gradients(per_channel, monkeypatch):
    x, g = normal(5, 3, 8, 8), normal(5, 3, 8, 8, seed=3)
    scale, shares, grids, factors = case(x, True, per_channel)
    eager = gradients(lambda *leaves: mixed(*leaves, grids, factors), g, x, scale, shares)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    traced = gradients(lambda *leaves: mixed(*leaves, grids, factors), g, x, scale, shares)
    assert "Mixed" not in type(traced[0].grad_fn).__name__ and "Mixed" in type(eager[0].grad_fn).__name__
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)


def ready(widths=WIDTHS, **settings):
    mixture = Mixture(widths, signed=True, **settings)
    mixture.initialize(normal(6, 5, 4), Mse())
    return mixture


@pytest.mark.parametrize("channels", [None, 6])
def test_the_module_mixes_lsq_quantizers_with_their_gradient_factors(channels):
    mixture, x, g = ready(channels=channels), normal(6, 5, 4).requires_grad_(), normal(6, 5, 4, seed=3)
    with torch.no_grad():
        mixture.logits.copy_(normal(4, seed=4))
    mixture(x).backward(g)
    logits, scale = (tensor.detach().clone().requires_grad_() for tensor in (mixture.logits, mixture.scale))
    parts = [
        fake_quantize(x, s[:, None, None] if channels else s, levels, scale_gradient_factor=lsq_gradient_factor(5 * 4, levels.qmax))
        for s, levels in zip(scale, mixture.grids, strict=True)
    ]
    y = sum(p * part for p, part in zip(logits.softmax(0), parts, strict=True))
    expected = torch.autograd.grad(y, (x, scale, logits), g)
    torch.testing.assert_close((x.grad, mixture.scale.grad, mixture.logits.grad), expected, rtol=1e-4, atol=1e-5)


def test_a_scale_below_the_least_still_gets_a_gradient():
    mixture, x = ready((4,)), normal(6, 5, 4)
    with torch.no_grad():
        mixture.scale.fill_(-1.0)
    mixture(x).backward(x)  # all values beyond a range of almost nothing: y / scale is the code at the end of the grid
    expected = torch.where(x > 0, 7 * x, -8 * x).sum() * lsq_gradient_factor(20, 7)
    torch.testing.assert_close(mixture.scale.grad, expected[None])


def test_a_price_is_taken_off_the_logits_and_infinity_forbids():
    mixture, other, x = ready(), ready(), normal(6, 5, 4)
    price = torch.tensor([0.5, 0.0, 2.0, 1.0])
    with torch.no_grad():
        mixture.logits.copy_(normal(4, seed=4))
        other.logits.copy_(mixture.logits - price)
        mixture.price.copy_(price)
        assert torch.equal(mixture.shares, other.shares) and torch.equal(mixture(x), other(x))
        mixture.price[3] = torch.inf
    three = ready(WIDTHS[:3])
    with torch.no_grad():
        three.logits.copy_(mixture.logits[:3] - price[:3])
    assert mixture.shares[3] == 0
    torch.testing.assert_close(mixture(x), three(x))
    mixture(x).square().sum().backward()
    assert mixture.logits.grad[3] == 0 and mixture.logits.grad.isfinite().all() and mixture.logits.grad[:3].any()
    assert not mixture.price.requires_grad


def test_equal_shares_at_first_and_errors():
    assert torch.equal(Mixture((2, 4), signed=True).shares, torch.tensor([0.5, 0.5]))
    with pytest.raises(BitscapeError, match="widths: none"):
        Mixture((), signed=True)
    with pytest.raises(BitscapeError, match="bits = 9"):
        Mixture((2, 9), signed=True)
    with pytest.raises(BitscapeError, match=r"call bitscape\.quantize"):
        Mixture((2,), signed=True)(normal(2, 2))


def net():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def images():
    return normal(16, 1, 6, 6, seed=1)


def mixed_net(groups=(("3",),), pinned=("0", "5")):
    network = mix(net(), WIDTHS, (2, 8), groups, dict.fromkeys(pinned, LayerBits(8, 8)))
    return calibrate(network, images())


class TestMix:
    def test_free_layers_get_mixtures_and_pinned_ones_their_bits(self):
        layers = quantized_layers(mixed_net())
        assert list(layers) == ["0", "3", "5"]
        assert static_bits(layers["0"]) == static_bits(layers["5"]) == LayerBits(8, 8)
        assert layers["3"].weight_quantizer.widths == WIDTHS and layers["3"].weight_quantizer.scale.shape == (4, 4)
        assert layers["3"].input_quantizer.widths == (2, 8) and layers["3"].input_quantizer.scale.shape == (2,)
        assert not layers["3"].input_quantizer.signed and layers["3"].weight_quantizer.signed

    def test_the_network_given_is_left_alone(self):
        model = net()
        before = copy.deepcopy(model.state_dict())
        mix(model, (2, 4), (4,), [["0", "3", "5"]], {})
        assert type(model[0]) is nn.Conv2d and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_each_candidates_scale_is_what_lsq_of_that_width_gets(self, bits):
        network = with_quantizers(net(), uniform_policy(("0", "3", "5"), LayerBits(bits, 8)), Lsq())
        alone = quantized_layers(calibrate(network, images()))
        layers = quantized_layers(mixed_net([["0"], ["3"], ["5"]], ()))
        for name, layer in layers.items():
            assert torch.equal(layer.weight_quantizer.scale[WIDTHS.index(bits)], alone[name].weight_quantizer.scale.flatten())
            assert torch.equal(layer.input_quantizer.scale[1], alone[name].input_quantizer.scale)
            assert layer.input_quantizer.signed == alone[name].input_quantizer.signed

    def test_a_one_hot_mixture_is_the_network_of_that_policy_bit_for_bit(self):
        network = mixed_net([["0"], ["3"], ["5"]], ())
        for layer in quantized_layers(network).values():
            layer.weight_quantizer.price[[0, 1, 3]] = torch.inf
            layer.input_quantizer.price[0] = torch.inf
        alone = calibrate(with_quantizers(net(), uniform_policy(("0", "3", "5"), LayerBits(4, 8))), images())
        assert torch.equal(network.eval()(images()), alone.eval()(images()))

    def test_the_layers_of_a_group_share_logits_and_price_but_not_scales(self):
        layers = quantized_layers(mixed_net([["0", "3"], ["5"]], ()))
        for kind in ("weight_quantizer", "input_quantizer"):
            first, second, apart = (getattr(layers[name], kind) for name in ("0", "3", "5"))
            assert first.logits is second.logits and first.price is second.price and first.scale is not second.scale
            assert first.logits is not apart.logits
            first.price.copy_(torch.arange(float(len(first.price))))
            assert torch.equal(first.shares, second.shares) and not torch.equal(first.shares, apart.shares)
        names = [name for name, _ in mixed_net([["0", "3"], ["5"]], ()).named_parameters() if name.endswith("logits")]
        assert names == [f"{layer}.{kind}_quantizer.logits" for layer in (0, 5) for kind in ("weight", "input")]

    def test_sharing_survives_a_copy_and_a_change_of_layout(self):
        network = copy.deepcopy(mixed_net([["0", "3"], ["5"]], ())).to(memory_format=torch.channels_last)
        first, second = (quantized_layers(network)[name].weight_quantizer for name in ("0", "3"))
        assert first.logits is second.logits
        with torch.no_grad():
            first.price.fill_(3.0)
        assert torch.equal(second.price, torch.full((4,), 3.0))

    def test_layers_of_one_weight_share_its_mixture(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
                self.right.weight = self.left.weight

            def forward(self, x):
                return self.right(self.left(x.flatten(1)[:, :6]))

        layers = quantized_layers(mix(Tied(), (2, 4), (4, 8), [["left", "right"]], {}))
        assert layers["left"].weight_quantizer is layers["right"].weight_quantizer
        assert layers["left"].input_quantizer is not layers["right"].input_quantizer
        assert layers["left"].input_quantizer.logits is layers["right"].input_quantizer.logits

    def test_the_state_goes_round_and_a_float_checkpoint_fits(self):
        network, fresh = mixed_net(), mix(net(), WIDTHS, (2, 8), [["3"]], dict.fromkeys("05", LayerBits(8, 8)))
        with torch.no_grad():
            network[3].weight_quantizer.logits.copy_(normal(4))
            network[3].input_quantizer.price.copy_(torch.tensor([0.0, torch.inf]))
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh.eval()(images()), network.eval()(images()))
        missing, unexpected = network.load_state_dict(net().state_dict(), strict=False)
        assert not unexpected and all("_quantizer" in name for name in missing)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed", [True, False])
def test_half_precision_is_mixed_as_in_float32(kind, per_channel, signed):
    x, g = (normal(5, 3, 8, 8, seed=seed).to(kind) for seed in (0, 3))
    scale, shares, grids, factors = case(x, signed, per_channel)
    exact, expected = gradients(lambda *leaves: mixed(*leaves, grids, factors), g.float(), x.float(), scale.float(), shares)
    with torch.autocast("cpu", kind):
        y, found = gradients(lambda *leaves: mixed(*leaves, grids, factors), g, x, scale.float(), shares)
    assert torch.equal(y, exact.to(kind)) and torch.equal(found[0], expected[0].to(kind))
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [None, 6])
def test_small_values_are_mixed_like_large_ones(channels):
    x = normal(6, 5, 4)
    large, small = (Mixture(WIDTHS, signed=True, channels=channels) for _ in range(2))
    large.initialize(x, Mse())
    small.initialize(x * 2.0**-80, Mse())
    assert torch.equal(small(x * 2.0**-80) * 2.0**80, large(x))
