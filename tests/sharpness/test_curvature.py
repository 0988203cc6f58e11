import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import bypassed, calibrate, with_quantizers
from bitscape.sharpness.ball import Ball
from bitscape.sharpness.curvature import top_eigenvalue
from tests.sharpness.small import batch, half_squared_error, quantized, regression, small_net


def exact_top(model, x, q, bias, labels):
    def loss_of(flat):
        return cross_entropy(linear(x, flat[: q.numel()].view_as(q), flat[q.numel() :] if bias is not None else None), labels)

    point = torch.cat([q.flatten(), *([bias.detach()] if bias is not None else [])])
    return torch.linalg.eigvalsh(hessian(loss_of, point).double())


@pytest.mark.parametrize("bias", [True, False])
def test_the_top_eigenvalue_of_softmax_regression_is_the_exact_one(bias):
    model, *parts = regression(bias=bias)
    images, labels = batch()
    exact = exact_top(model, *parts, labels)
    found = top_eigenvalue(model, images, labels, iterations=200, tolerance=1e-6, batch_size=5)
    assert found.value == pytest.approx(float(exact[-1]), rel=1e-4)
    assert found.residual < 0.01 and found.iterations < 200
    without = top_eigenvalue(model, images, labels, iterations=200, tolerance=1e-6, ball=Ball(biases=False))
    if bias:
        assert without.value < found.value
    else:
        assert without.value == pytest.approx(found.value, rel=1e-3)


def test_activations_enter_straight_through():
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Sigmoid(), nn.Linear(4, 3)))
    images, labels = batch()
    first, last = model[1], model[3]
    last.input_quantizer.scale.data.mul_(0.8)
    x = first.input_quantizer(images.flatten(1)).detach()
    point = [t.detach() for layer in (first, last) for t in (layer.weight_quantizer(layer.weight), layer.bias)]

    def hidden(w, b):
        return linear(x, w, b).sigmoid()

    def clipped(h):
        return h.clamp(max=7 * last.input_quantizer.scale.detach())

    at_point = hidden(*point[:2])
    rounding = last.input_quantizer(at_point).detach() - clipped(at_point)
    assert int((at_point > clipped(at_point)).sum()) > 0 and int((rounding != 0).sum())

    def loss_of(flat):
        w, b, v, c = (part.view_as(t) for part, t in zip(flat.split([t.numel() for t in point]), point, strict=True))
        return cross_entropy(linear(clipped(hidden(w, b)) + rounding, v, c), labels)

    exact = torch.linalg.eigvalsh(hessian(loss_of, torch.cat([t.flatten() for t in point])).double())
    found = top_eigenvalue(model, images, labels, iterations=300, tolerance=1e-7)
    assert found.value == pytest.approx(float(exact[-1]), rel=1e-4)


def test_a_layer_that_runs_twice_is_one_variable():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, bias=False)
    images = torch.randn(6, 1, 1, 3)
    model = quantized(nn.Sequential(nn.Flatten(), layer, layer), images=images)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    with bypassed(model, "input_quantizer"):
        found = top_eigenvalue(model, images, labels, iterations=300, tolerance=1e-7)
    x, q = images.flatten(1), model[1].weight_quantizer(model[1].weight).detach()
    exact = torch.linalg.eigvalsh(hessian(lambda w: cross_entropy(x @ w.T @ w.T, labels), q).view(9, 9).double())
    assert found.value == pytest.approx(float(max(exact, key=abs)), rel=1e-4)


class Attention(nn.Module):
    """One head over the 36 pixels, by the fused function."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(2, 2), nn.Linear(2, 2)
        self.norm, self.head = nn.LayerNorm(2), nn.Linear(2, 3)

    def forward(self, x):
        x = x.flatten(2).mT.contiguous()  # else the fused function is not taken
        y = scaled_dot_product_attention(*(v[:, None] for v in (self.query(x), self.key(x), x)))
        return self.head(self.norm(y[:, 0].mean(1)))


def test_a_float_network_with_fused_attention():
    torch.manual_seed(0)
    model, (images, labels) = Attention(), batch()
    found = top_eigenvalue(model, images, labels, iterations=300, tolerance=1e-7)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    point = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss_of(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return cross_entropy(functional_call(model, weights, images), labels)

    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.linalg.eigvalsh(hessian(loss_of, point).double())
    assert found.value == pytest.approx(float(max(exact, key=abs)), rel=1e-3)


def test_the_eigenvalue_of_largest_magnitude_may_be_negative():
    model, x, *_ = regression(bias=False)
    images, labels = batch()
    found = top_eigenvalue(model, images, labels, iterations=100, tolerance=1e-6, loss=lambda *both: -half_squared_error(*both))
    exact = torch.linalg.eigvalsh(x.T.double() @ x.double() / len(x))
    assert found.value == pytest.approx(-float(exact[-1]), rel=1e-3)


def test_a_linear_loss_has_no_curvature():
    model, *_ = regression()
    found = top_eigenvalue(model, *batch(), loss=lambda logits, _: logits.sum() * 0)
    assert (found.value, found.residual, found.iterations) == (0.0, 0.0, 1)


def test_the_eigenvalue_follows_the_seed_and_ends_by_tolerance():
    model, data = small_net().eval(), batch()
    one, two = (top_eigenvalue(model, *data, iterations=5, tolerance=0, seed=0) for _ in range(2))
    assert one == two and one.iterations == 5
    assert top_eigenvalue(model, *data, iterations=5, tolerance=0, seed=1) != one
    assert top_eigenvalue(model, *data, iterations=50, tolerance=10.0).iterations == 2


def test_settings_out_of_range_are_named():
    with pytest.raises(BitscapeError, match=r"iterations = 0"):
        top_eigenvalue(small_net(), *batch(), iterations=0)
    with pytest.raises(BitscapeError, match=r"without clips"):
        top_eigenvalue(small_net(), *batch(), ball=Ball(clips=True))


def test_latent_weights_have_the_curvature_of_the_values_that_they_stand_for():
    images = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    policy = Policy({"0": LayerBits(8, 16), "2": LayerBits(8, 16)})
    network = calibrate(with_quantizers(model, policy), images)
    ball, settings = Ball(weights="latent"), {"iterations": 200, "tolerance": 1e-5}
    found = top_eigenvalue(network, images, labels, ball=ball, **settings)
    expected = top_eigenvalue(model, images, labels, ball=ball, **settings)
    assert found.value == pytest.approx(expected.value, rel=0.05)
