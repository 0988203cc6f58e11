import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitscape.quant.functional import MINIMUM_SCALE, fake_quantize, power_of_two, round_ste, scale_gradient
from bitscape.quant.grid import Grid, grid
from bitscape.quant.reference import dequantize, quantize
from tests import formulas

GRIDS = st.builds(grid, st.integers(1, 8), signed=st.booleans(), narrow=st.booleans(), mid_rise=st.booleans())
VALUES = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=30).map(torch.tensor)
SCALES = st.floats(2**-10, 100, width=32).map(torch.tensor)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def random_case(shape=(4, 3, 5, 5), seed=0):
    """Values that reach beyond a 3-bit grid of scale 0.4, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 1.2, torch.randn(shape, generator=generator)


def gradients(function, upstream, *inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return output, torch.autograd.grad(output, leaves, upstream)


@given(VALUES, SCALES, GRIDS)
def test_results_are_scaled_codes_within_the_limits(x, scale, limits):
    q = quantize(x, scale, limits)
    assert torch.equal(q, q.round())
    assert limits.qmin <= q.min() and q.max() <= limits.qmax
    assert torch.equal(fake_quantize(x, scale, limits), dequantize(q, scale, limits.zero_point))


@given(VALUES, SCALES, GRIDS)
def test_a_second_pass_changes_nothing(x, scale, limits):
    once = fake_quantize(x, scale, limits)
    assert torch.equal(fake_quantize(once, scale, limits), once)


@given(VALUES, SCALES, GRIDS)
def test_no_level_is_nearer(x, scale, limits):
    levels = (torch.arange(limits.qmin, limits.qmax + 1) - limits.zero_point) * scale
    nearest = (x[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((fake_quantize(x, scale, limits) - x).abs(), nearest, rtol=1e-5, atol=1e-5)


@given(VALUES, SCALES, GRIDS)
def test_values_are_those_of_the_formula(x, scale, limits):
    assert torch.equal(fake_quantize(x, scale, limits), formulas.fake_quantize(x, scale, limits))


def test_rounding_is_half_to_even_with_a_straight_through_gradient():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 0.3])
    y, (g,) = gradients(round_ste, torch.arange(6.0), x)
    assert y.tolist() == [-2, 0, 0, 2, 2, 0]
    assert torch.equal(g, torch.arange(6.0))


def test_scale_gradient_scales_the_gradient_alone():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    y, (g,) = gradients(lambda x: scale_gradient(x, 0.037), torch.ones(100), x)
    assert torch.equal(y, x)
    torch.testing.assert_close(g, torch.full((100,), 0.037))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("limits", [grid(3, signed=True), grid(3, signed=False), grid(1, signed=True)], ids=repr)
def test_gradients_are_those_of_lsq(limits, per_channel, layout):
    """Esser et al., Eq. 3 and 5, summed over the elements that share a scale; the range from the zero point on."""
    x, g = (tensor.to(memory_format=layout) for tensor in random_case())
    scale = torch.tensor([0.2, 0.4, 0.9]).reshape(1, 3, 1, 1) if per_channel else torch.tensor(0.4)
    factor = 0.25
    _, (g_x, g_scale) = gradients(lambda x, s: fake_quantize(x, s, limits, scale_gradient_factor=factor), g, x, scale)
    low, high = limits.qmin - limits.zero_point, limits.qmax - limits.zero_point
    v = x / scale
    inside = (low <= v) & (v <= high)
    rounded = (v + limits.zero_point).round() - limits.zero_point
    slope = torch.where(inside, rounded - v, torch.where(v < low, low, high))
    assert inside.any() and not inside.all()
    assert torch.equal(g_x, torch.where(inside, g, 0.0))
    torch.testing.assert_close(g_scale, factor * (g * slope).sum_to_size(scale.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero_point", [torch.tensor(2.3), torch.tensor([1.0, 2.3, 4.7]).reshape(1, 3, 1, 1)])
def test_gradients_with_a_zero_point_are_those_of_autograd(zero_point, layout):
    x, g = (tensor.to(memory_format=layout) for tensor in random_case())
    inputs = (x, torch.full_like(zero_point, 0.4), zero_point)
    written = gradients(lambda x, s, z: fake_quantize(x, s, Grid(0, 7, z)), g, *inputs)
    traced = gradients(lambda x, s, z: formulas.fake_quantize(x, s, Grid(0, 7, z)), g, *inputs)
    assert torch.equal(written[0], traced[0])
    for ours, theirs in zip(written[1], traced[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_image_may_have_its_own_bits(layout):
    x, g = (tensor.to(memory_format=layout) for tensor in random_case())
    bits = torch.tensor([1, 2, 4, 8])
    scale = torch.tensor(0.1)
    limits = grid(bits.reshape(-1, 1, 1, 1), signed=True)
    y, (g_x, g_scale) = gradients(lambda x, s: fake_quantize(x, s, limits), g, x, scale)
    total = torch.zeros(())
    for index, width in enumerate(bits.tolist()):
        alone = partial(fake_quantize, grid=grid(width, signed=True))
        one, (g_one, g_one_scale) = gradients(alone, g[index], x[index], scale)
        assert torch.equal(y[index], one)
        assert torch.equal(g_x[index], g_one)
        total += g_one_scale
    torch.testing.assert_close(g_scale, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.full((1, 3, 1, 1), 0.25)])
def test_bfloat16_stays_bfloat16_and_scales_keep_float32_gradients(scale):
    x, g = (tensor.bfloat16() for tensor in random_case())
    limits = grid(3, signed=True)
    y, (g_x, g_scale) = gradients(lambda x, s: fake_quantize(x, s, limits), g, x, scale)
    assert (y.dtype, g_x.dtype, g_scale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(y.float(), fake_quantize(x.float(), scale, limits))  # exact: a scale of 1/4
    _, (_, expected) = gradients(lambda x, s: fake_quantize(x, s, limits), g.float(), x.float(), scale)
    torch.testing.assert_close(g_scale, expected, rtol=1e-2, atol=1e-2)


def test_strided_values_and_gradients_are_handled():
    x, g = random_case((4, 6, 5, 5))
    limits, scale = grid(3, signed=True), torch.tensor(0.4)
    _, expected = gradients(lambda x, s: fake_quantize(x, s, limits), g[:, ::2], x[:, ::2].contiguous(), scale)
    leaf, scale = x.clone().requires_grad_(), scale.requires_grad_()
    fake_quantize(leaf[:, ::2], scale, limits).backward(g[:, ::2])
    assert torch.equal(leaf.grad[:, ::2], expected[0])
    torch.testing.assert_close(scale.grad, expected[1], rtol=1e-4, atol=1e-4)


def test_a_frozen_scale_costs_no_gradient():
    x = torch.randn(5, requires_grad=True)
    fake_quantize(x, torch.tensor(0.4), grid(8, signed=True)).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))


TRACED = {
    "signed": grid(4, signed=True),
    "signs": grid(1, signed=True),
    "bits by image": grid(torch.tensor([1, 2, 4, 8]).reshape(-1, 1, 1, 1), signed=True),
    "zero point": Grid(0, 7, torch.tensor(2.3)),
    "zero points": Grid(0, 7, torch.tensor([1.0, 2.3, 4.7]).reshape(1, 3, 1, 1)),
}


@pytest.mark.parametrize("limits", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([0.2, -1.0, 0.9]).reshape(1, 3, 1, 1)])
def test_the_form_for_compilers_has_the_same_values_and_gradients(scale, limits, monkeypatch):
    x, g = random_case()
    inputs = [x, scale, limits.zero_point] if isinstance(limits.qmax, int) and isinstance(limits.zero_point, torch.Tensor) else [x, scale]

    def function(x, s, z=limits.zero_point):
        return fake_quantize(x, s, Grid(limits.qmin, limits.qmax, z), scale_gradient_factor=0.25)

    eager = gradients(function, g, *inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    traced = gradients(function, g, *inputs)
    assert torch.equal(traced[0], eager[0])
    for one, other in zip(traced[1], eager[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "FakeQuantize" in type(eager[0].grad_fn).__name__ and "FakeQuantize" not in type(traced[0].grad_fn).__name__


def test_a_second_derivative_passes_through_the_gradient():
    """What a Hessian-vector product needs: the mask is a constant, the gradient that comes in is not."""
    x, weight = random_case()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = (fake_quantize(x, torch.tensor(0.4), grid(3, signed=True)) * weight).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    found = torch.autograd.grad(gradient.square().sum(), [x, weight])
    level = fake_quantize(x, torch.tensor(0.4), grid(3, signed=True)).detach()
    inside = (x >= -1.6) & (x <= 1.2)
    slope = 2 * level * weight**2 * inside  # of y by x
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(found[0], 2 * slope * 2 * weight**2 * inside)
    torch.testing.assert_close(found[1], 2 * slope * 4 * level * weight * inside)


HALVES = [torch.bfloat16, torch.float16]
STEPS = [torch.tensor(0.3), torch.tensor([0.3, 0.07, 0.011]).reshape(1, 3, 1, 1)]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("scale", STEPS, ids=["per tensor", "per channel"])
@pytest.mark.parametrize("limits", [grid(8, signed=True), grid(4, signed=False), grid(1, signed=True)], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_quantized_as_in_float32(kind, scale, limits, layout):
    x, g = (tensor.to(memory_format=layout).to(kind) for tensor in random_case((4, 3, 16, 16)))
    function = partial(fake_quantize, grid=limits, scale_gradient_factor=0.25)
    exact, (exact_x, exact_scale) = gradients(function, g.float(), x.float(), scale)
    for cast in (False, True):
        with torch.autocast("cpu", kind, enabled=cast):
            y, (g_x, g_scale) = gradients(function, g, x, scale)
        assert y.dtype == g_x.dtype == kind and g_scale.dtype == torch.float32
        assert torch.equal(y, exact.to(kind)) and torch.equal(g_x, exact_x.to(kind))
        torch.testing.assert_close(g_scale, exact_scale, rtol=1e-5, atol=1e-5)
        assert torch.equal(formulas.fake_quantize(x, scale, limits), y)


def test_of_half_precision_the_input_alone_is_saved():
    x, _ = (tensor.bfloat16() for tensor in random_case((4, 3, 16, 16)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize(x.requires_grad_(), torch.tensor(0.3, requires_grad=True), grid(4, signed=True))
    assert [tensor.data_ptr() for tensor in saved if tensor is not None and tensor.numel() > 1] == [x.data_ptr()]


@pytest.mark.parametrize("value", [1e-38, 3e-30, 0.7, 1.0, 1.99, 2.0, 5e20, 3e38])
def test_the_power_of_two_of_a_value_is_the_largest_below_it(value):
    (power,) = power_of_two(torch.tensor([value])).tolist()
    assert power <= torch.tensor(value) < 2 * power and math.frexp(power)[0] == 0.5


def test_the_power_of_two_of_zero_is_one():
    assert power_of_two(torch.tensor([0.0, 4.0])).tolist() == [1.0, 4.0]


def test_gradients_stay_finite_at_the_smallest_scale():
    """A learned scale that training pushed below zero has it; the derivative of a quotient would be infinite there."""
    limits, generator = grid(4, signed=True), torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    g[0, 0, 0] = 0.0  # a gradient of zero times infinity would be no number
    x[0, 0, 0] = 0.0
    scale = torch.tensor(MINIMUM_SCALE)
    _, by_function = gradients(lambda x, s: fake_quantize(x, s, limits), g, x, scale)
    _, traced = gradients(lambda x, s: formulas.fake_quantize(x, s, limits), g, x, scale)
    for expected, gradient in zip(by_function, traced, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(gradient, expected)


def test_the_least_scale_is_not_lost_in_float16():
    scale = torch.zeros((), dtype=torch.float16)
    y = fake_quantize(torch.tensor([0.0, 1.0], dtype=torch.float16), scale, grid(4, signed=True))
    assert y.isfinite().all()
