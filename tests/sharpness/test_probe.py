import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitscape.errors import BitscapeError
from bitscape.sharpness.curvature import top_eigenvalue
from bitscape.sharpness.probe import probe_sharpness
from tests.sharpness.small import batch, float_net, half_squared_error, regression, small_net


@pytest.mark.parametrize("batch_size", [5, 64])
def test_on_a_quadratic_loss_gap_and_curvature_are_the_formula(batch_size):
    model, x, q, _ = regression(bias=False)
    images, labels = batch()
    found = probe_sharpness(model, images, labels, radius=0.2, loss=half_squared_error, batch_size=batch_size)
    x, q = x.double(), q.double()
    g = (x @ q.T - labels[:, None]).T @ x / len(x)
    direction = g / g.norm()
    bend = (direction @ x.T).square().sum() / len(x)  # <d, H d>, H = X^T X / n for each output
    gap = 0.2 * g.norm() + 0.2**2 / 2 * bend
    assert found.loss == pytest.approx(float((x @ q.T - labels[:, None]).square().sum() / len(x) / 2), rel=1e-5)
    assert found.gap == pytest.approx(float(gap), rel=1e-4)
    assert found.curvature == pytest.approx(float(2 * gap / 0.2**2), rel=1e-4)
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-5)


def test_at_a_minimum_the_curvature_is_the_hessians_along_the_gradient():
    # One output and one feature: the Hessian is a number. A nearly fitted weight leaves a small gradient.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False))
    images = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    model[1].weight.data.fill_(1 + 1e-4)
    found = probe_sharpness(model, images, images.flatten(), radius=0.5, loss=half_squared_error)
    assert found.curvature == pytest.approx(14 / 3, rel=2e-3)


@pytest.mark.parametrize("measure", [probe_sharpness, top_eigenvalue])
@pytest.mark.parametrize("pack", [lambda left, right: (left, right), lambda left, right: {"right": right, "left": left}])
def test_several_inputs_and_nested_outputs_are_those_of_one_tensor(measure, pack):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, left, right):
            return {"logits": self.net(torch.cat([left, right], 3))}

    model, (images, labels) = Halves(), batch()
    expected = measure(model.net, images, labels, batch_size=5)
    inputs, targets = pack(*images.split(3, dim=3)), {"labels": labels}
    found = measure(model, inputs, targets, loss=lambda o, t: cross_entropy(o["logits"], t["labels"]), batch_size=5)
    assert found == expected


@pytest.mark.parametrize("measure", [probe_sharpness, top_eigenvalue])
@pytest.mark.parametrize("make", [float_net, small_net])
def test_the_network_stays_as_it_was(measure, make):
    model = make(dropout=0.5)
    model[1].eval()
    for p in list(model.parameters())[:3]:
        p.grad = torch.ones_like(p)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    measure(model, *batch())
    now = model.state_dict()
    assert all(torch.equal(state[name], now[name]) for name in state)
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    for at, p in enumerate(model.parameters()):
        assert torch.equal(p.grad, torch.ones_like(p)) if at < 3 else p.grad is None


@pytest.mark.parametrize("measure", [probe_sharpness, top_eigenvalue])
def test_bad_input_is_named(measure):
    model, (images, labels) = small_net(), batch()
    with pytest.raises(BitscapeError, match="12 images, 11 labels"):
        measure(model, images, labels[:11])
    with pytest.raises(BitscapeError, match="at least one image"):
        measure(model, images[:0], labels[:0])
    with pytest.raises(BitscapeError, match="batch_size = 0"):
        measure(model, images, labels, batch_size=0)
    with pytest.raises(BitscapeError, match="is nan on these images"):
        measure(model, images * torch.nan, labels)
    with pytest.raises(BitscapeError, match="member"):
        measure(model.requires_grad_(False), images, labels)


def test_a_radius_of_0_is_named():
    with pytest.raises(BitscapeError, match=r"radius = 0"):
        probe_sharpness(small_net(), *batch(), radius=0)
