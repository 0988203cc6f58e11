"""Every quantizer at every bit-width."""

import copy
from itertools import pairwise

import pytest
import safetensors.torch
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.quant.grid import grid
from bitscape.quant.observers import MinMax, Mse, Percentile
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact, PerChannel, PerTensor
from bitscape.quant.quantizers.base import grouped, scale_shape

QUANTIZERS = [
    Lsq(),
    Lsq(weight_scales=PerTensor()),
    LsqPlus(),
    LsqPlus(weight_scales=PerTensor()),
    Pact(),
    Dorefa(),
    Dorefa(restore_scale=False),
    Liq(),
    Liq(restore_scale=False),
]
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
every_width = pytest.mark.parametrize("bits", range(1, 9))


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02


def activations(signed: bool, seed: int = 1) -> torch.Tensor:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2
    return x if signed else x.relu()


def weight_quantizer(quantizer, bits: int, values: torch.Tensor, observer=None):
    fake = quantizer.for_weight(values, bits)
    fake.initialize(values, observer or Mse())
    return fake


def input_quantizer(quantizer, bits: int, values: torch.Tensor):
    fake = quantizer.for_activation(bits)
    fake.initialize(values, Mse())
    return fake


@every_quantizer
@every_width
def test_codes_are_the_forward_pass(quantizer, bits):
    w = weight()
    for layout in (torch.contiguous_format, torch.channels_last):
        w = w.to(memory_format=layout)
        fake = weight_quantizer(quantizer, bits, w)
        with torch.no_grad():  # as training leaves it: scales off their starting point
            for parameter in fake.parameters():
                parameter.mul_(0.83)
        codes = fake.codes(w)
        assert torch.equal(codes.dequantize(), fake(w))
        assert codes.q.dtype == torch.int8 and codes.q.shape == w.shape
        limits = grid(bits, signed=True)
        assert limits.qmin <= codes.q.min() and codes.q.max() <= limits.qmax
        assert codes.zero_point == fake.grid.zero_point


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if getattr(q, "restore_scale", True)], ids=repr)
def test_more_bits_bring_the_result_nearer_to_the_weight(quantizer):
    w = weight() - weight().mean()  # LIQ leaves the mean out
    errors = [(weight_quantizer(quantizer, bits, w)(w) - w).square().mean() / w.var() for bits in range(2, 9)]
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors[:5]))
    # At 8 bits what is left is LSQ+'s clipping at three standard deviations, and DoReFa's tanh.
    assert errors[0] < 0.6 and errors[-1] < 2e-3


@every_quantizer
@every_width
def test_gradients_reach_the_weight_and_what_is_learned(quantizer, bits):
    w = weight().requires_grad_()
    fake = weight_quantizer(quantizer, bits, w.detach())
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
    fake(w).backward(upstream)
    assert torch.isfinite(w.grad).all() and w.grad.abs().sum() > 0
    for parameter in fake.parameters():
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).all()


@every_quantizer
@every_width
@pytest.mark.parametrize("signed", [False, True])
def test_inputs_are_laid_on_at_most_two_to_the_bits_levels(quantizer, bits, signed):
    x = activations(signed)
    fake = input_quantizer(quantizer, bits, x)
    y = fake(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.isfinite(y).all()
    assert len(y.detach().div(fake.scale.detach()).mul(64).round().unique()) <= 2**bits
    assert len(y.unique()) > 1
    assert (y - x).square().mean() < x.square().mean()


@every_quantizer
@every_width
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_reach_the_input_and_its_range(quantizer, bits, signed):
    x = activations(signed).requires_grad_()
    fake = input_quantizer(quantizer, bits, x.detach())
    (fake(x * 1.5) * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    for parameter in fake.parameters():
        assert torch.isfinite(parameter.grad) and parameter.grad != 0


@every_quantizer
@pytest.mark.parametrize("signed", [False, True])
def test_inputs_in_bfloat16_stay_there(quantizer, signed):
    x = activations(signed)
    fake = input_quantizer(quantizer, 4, x)
    y = fake(x.bfloat16().requires_grad_())
    y.sum().backward()
    assert y.dtype == torch.bfloat16


@every_quantizer
@pytest.mark.parametrize("signed", [False, True])
def test_the_state_dict_carries_everything(quantizer, signed):
    x, w = activations(signed), weight()
    pair = nn.ModuleDict({"w": weight_quantizer(quantizer, 3, w), "x": input_quantizer(quantizer, 3, x)})
    state = safetensors.torch.load(safetensors.torch.save(pair.state_dict()))
    fresh = nn.ModuleDict({"w": quantizer.for_weight(weight(9), 3), "x": quantizer.for_activation(3)})
    fresh.load_state_dict(state)
    assert fresh["x"].initialized and fresh["w"].initialized
    assert fresh["x"].signed == pair["x"].signed
    assert torch.equal(fresh["x"](x), pair["x"](x))
    assert torch.equal(fresh["w"](w), pair["w"](w))


@every_quantizer
def test_copies_are_independent(quantizer):
    w = weight()
    fake = weight_quantizer(quantizer, 3, w)
    before = fake(w)
    other = copy.deepcopy(fake)
    other.initialize(w * 3, MinMax())
    assert torch.equal(fake(w), before)


@every_quantizer
def test_a_call_before_initialize_is_an_error(quantizer):
    w, x = weight(), activations(False)
    with pytest.raises(BitscapeError, match="before its scale was set"):
        quantizer.for_weight(w, 4)(w)
    with pytest.raises(BitscapeError, match="before its scale was set"):
        quantizer.for_weight(w, 4).codes(w)
    with pytest.raises(BitscapeError, match="before its scale was set"):
        quantizer.for_activation(4)(x)


@every_quantizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(quantizer, bad):
    w, x = weight(), activations(True)
    w[0, 0, 0, :2] = bad
    x[0, 0, 0, 0] = bad
    fake = quantizer.for_weight(w, 4)
    with pytest.raises(BitscapeError, match="2 of 216 values are NaN or infinite"):
        fake.initialize(w, Mse())
    assert not fake.initialized
    with pytest.raises(BitscapeError, match="1 of 432 values"):
        quantizer.for_activation(4).initialize(x, Mse())


@every_quantizer
@every_width
def test_a_dead_channel_and_a_dead_weight_stay_finite(quantizer, bits):
    w = weight()
    w[2] = 0
    for values in (w, torch.zeros_like(w)):
        for observer in (Mse(), MinMax(), Percentile()):
            fake = weight_quantizer(quantizer, bits, values, observer)
            assert torch.isfinite(fake(values)).all()


@every_quantizer
@pytest.mark.parametrize("bits", [0, 9])
def test_a_bit_width_outside_1_to_8_is_an_error(quantizer, bits):
    with pytest.raises(BitscapeError, match=f"bits = {bits}"):
        quantizer.for_weight(weight(), bits)
    with pytest.raises(BitscapeError, match=f"bits = {bits}"):
        quantizer.for_activation(bits)


def test_the_sign_of_inputs_follows_the_values():
    fake = Lsq().for_activation(4)
    fake.initialize(activations(True), Mse())
    assert fake.signed and fake.grid.qmin == -8
    fake.initialize(activations(False), Mse())
    assert not fake.signed and fake.grid.qmin == 0
    assert "bits=4, unsigned" in repr(fake)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_scales_are_shared_along_all_other_axes(axis):
    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    shape = scale_shape(x.shape, PerChannel(axis))
    assert shape == tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
    rows = grouped(x, shape)
    assert rows.shape == (x.shape[axis], x.numel() // x.shape[axis])
    assert torch.equal(rows[1].sort().values, x.select(axis, 1).flatten().sort().values)
    assert grouped(x, scale_shape(x.shape, PerTensor())).shape == (1, 120)


TINY = 2.0**-80


@every_quantizer
@every_width
def test_small_weights_are_quantized_like_large_ones(quantizer, bits):
    w = weight()
    if isinstance(quantizer, Dorefa | Pact):
        w = w / 1000  # where tanh is linear, up to a millionth
    large, small = (weight_quantizer(quantizer, bits, w * factor) for factor in (1.0, TINY))
    restores = getattr(quantizer, "restore_scale", True) or (bits == 1 and isinstance(quantizer, Dorefa))
    expected, found = large(w), small(w * TINY) / (TINY if restores else 1.0)
    tolerance = float(large.codes(w).scale.max()) if isinstance(quantizer, Dorefa | Pact) else 0.0
    assert (found - expected).abs().max() <= 1.001 * tolerance  # a code more where tanh moves a value over an edge
    assert (found != expected).float().mean() < (0.02 if tolerance and bits > 1 else 1e-9)


@every_quantizer
@pytest.mark.parametrize("signed", [False, True])
def test_small_activations_are_quantized_like_large_ones(quantizer, signed):
    x = activations(signed)
    for bits in range(1, 9):
        large, small = (input_quantizer(quantizer, bits, x * factor) for factor in (1.0, TINY))
        torch.testing.assert_close(small(x * TINY) / TINY, large(x), rtol=1e-6, atol=1e-6)


@every_quantizer
@every_width
def test_weights_of_nothing_stay_next_to_nothing(quantizer, bits):
    w = torch.zeros(6, 4, 3, 3)
    fake = weight_quantizer(quantizer, bits, w)
    codes = fake.codes(w)
    assert torch.isfinite(1 / codes.scale).all() and torch.equal(codes.dequantize(), fake(w))
    if getattr(quantizer, "restore_scale", True):
        assert fake(w).abs().max() < 1e-25


@every_quantizer
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [False, True])
def test_half_precision_activations_take_the_codes_and_gradients_of_float32(quantizer, kind, signed):
    x, g = activations(signed), activations(True, seed=2)
    for bits in (1, 4, 8):
        fake = input_quantizer(quantizer, bits, x)
        leaf = x.to(kind).requires_grad_()
        fake(leaf.float()).backward(g.to(kind).float())
        exact, leaf.grad = [leaf.grad.to(kind), *(p.grad.clone() for p in fake.parameters())], None
        fake.zero_grad()
        with torch.autocast("cpu", kind):
            y = fake(leaf)
            assert torch.equal(y, fake(leaf.float()).to(kind))
        y.backward(g.to(kind))
        torch.testing.assert_close([leaf.grad, *(p.grad for p in fake.parameters())], exact, rtol=1e-5, atol=1e-5)


@every_quantizer
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_weights_take_the_codes_of_float32(quantizer, kind):
    w = weight().to(kind)
    fake = weight_quantizer(quantizer, 4, w)
    assert torch.equal(fake(w), fake(w.float()).to(kind))
    assert torch.equal(fake.codes(w).dequantize(), fake(w.float()))
