import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from bitscape.errors import BitscapeError
from bitscape.sharpness.ball import Ball
from bitscape.sharpness.landscape import loss_slice
from bitscape.sharpness.probe import probe_sharpness
from tests.sharpness.small import batch, float_net, half_squared_error, quantized, regression, small_net


def filterwise(weight, seed):
    """Both directions of a single layer, filter by filter."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(weight.shape, generator=generator) for _ in range(2)]
    return [torch.stack([d * w.norm() / d.norm() for d, w in zip(each, weight, strict=True)]) for each in drawn]


@pytest.mark.parametrize("weights", ["quantized", "latent"])
def test_a_slice_of_softmax_regression_is_the_formula(weights):
    model, x, q, bias = regression()
    images, labels = batch()
    layer = model[1]
    latent = layer.weight.detach().clone()
    moved = q if weights == "quantized" else latent
    one, two = filterwise(moved, seed=7)
    found = loss_slice(model, images, labels, span=0.5, points=5, seed=7, ball=Ball(weights=weights), batch_size=5)
    assert found.offsets == (-0.5, -0.25, 0.0, 0.25, 0.5)
    for i, a in enumerate(found.offsets):
        for j, b in enumerate(found.offsets):
            weight = moved + a * one + b * two
            weight = weight if weights == "quantized" else layer.weight_quantizer(weight)
            assert found.losses[i][j] == pytest.approx(cross_entropy(linear(x, weight, bias), labels).item(), rel=1e-5)
    assert found.losses[0][4] != pytest.approx(found.losses[4][0], rel=1e-3)  # the two axes can be told apart


def test_on_a_quadratic_loss_every_line_is_a_parabola():
    model, x, q, _ = regression(bias=False)
    found = loss_slice(model, *batch(), span=2.0, points=7, loss=half_squared_error)
    losses = torch.tensor(found.losses, dtype=torch.float64)
    for lines, direction in zip((losses, losses.T), filterwise(q, seed=0), strict=True):
        bend = float((direction.double() @ x.double().T).square().sum() / len(x))  # <d, H d>, H = X^T X / n for each output
        second = lines.diff(n=2, dim=0) / (2.0 / 3) ** 2
        assert second.flatten().tolist() == pytest.approx([bend] * second.numel(), rel=1e-3)


@pytest.mark.parametrize("make", [float_net, small_net])
@pytest.mark.parametrize("span", [0.7, 1.0])
def test_the_center_is_the_networks_loss_exactly(make, span):
    model, (images, labels) = make(dropout=0.5), batch()
    found = loss_slice(model, images, labels, span=span, points=3)
    assert found.center == found.losses[1][1] == probe_sharpness(model, images, labels).loss
    assert found.center == cross_entropy(model.eval()(images), labels).item()


def test_biases_and_norms_do_not_move():
    # Only the weights of the linear layer scale with the input; on black images nothing else could change the loss.
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.LayerNorm(3))
    images, labels = batch()
    losses = loss_slice(model, images * 0, labels, points=5).losses
    assert {loss for row in losses for loss in row} == {losses[2][2]}


def weights_used(layer):
    """Every weight that the convolution computes with from now on."""
    used, run = [], layer._conv_forward

    def watched(x, weight, bias):
        used.append(weight.detach().clone())
        return run(x, weight, bias)

    layer._conv_forward = watched
    return used


@pytest.mark.parametrize("make", [float_net, small_net])
def test_every_filter_moves_by_its_own_length(make):
    model = make()
    model[0].weight.data[1] = 0  # a filter of zeros has no length
    seen = [weights_used(model[at]) for at in (0, 4)]
    loss_slice(model, *batch(), span=2.0, points=3)
    for before, *moved in seen:  # then (-2, -2), (-2, 0), (-2, 2), (0, -2), ...
        assert len(moved) == 9 and torch.equal(before, moved[4])
        steps = [(weight - before).flatten(1) for weight in moved]
        for at in (1, 3, 5, 7):
            assert torch.allclose(steps[at].norm(dim=1), 2 * before.flatten(1).norm(dim=1), rtol=1e-4)
        assert torch.allclose(steps[2], steps[1] + steps[5], atol=1e-5)
    assert not seen[0][0][1].any() and not seen[0][1][1].any() and seen[1][0].flatten(1).norm(dim=1).all()


def test_networks_of_one_architecture_get_the_same_gaussians():
    gaussians, lengths = [], []
    for model in (float_net(), small_net(bits=2)):
        used = weights_used(model[4])
        loss_slice(model, *batch(), points=3, seed=3)
        gaussians.append(nn.functional.normalize((used[8] - used[0]).flatten(1)))  # the point (1, 0)
        lengths.append(used[0].flatten(1).norm(dim=1))
    assert torch.allclose(*gaussians, atol=1e-5) and not torch.allclose(*lengths, rtol=0.01)


def test_the_slice_follows_the_seed_and_is_json():
    model, data = small_net(), batch()
    one, two = (loss_slice(model, *data, points=3, seed=1) for _ in range(2))
    assert one == two != loss_slice(model, *data, points=3, seed=2)
    assert json.loads(json.dumps(dataclasses.asdict(one))) == {"offsets": [-1.0, 0.0, 1.0], "losses": [list(row) for row in one.losses]}


@pytest.mark.parametrize("weights", ["quantized", "latent"])
@pytest.mark.parametrize("make", [float_net, small_net])
def test_the_network_stays_as_it_was(make, weights):
    model = make(dropout=0.5)
    model[1].eval()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    loss_slice(model, *batch(), points=3, ball=Ball(weights=weights))
    now = model.state_dict()
    assert all(torch.equal(state[name], now[name]) for name in state)
    assert [m.training for m in model.modules()] == modes and torch.equal(random, torch.get_rng_state())
    assert torch.equal(first.grad, torch.ones_like(first)) and [p for p in model.parameters() if p.grad is not None] == [first]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failure_on_the_way_leaves_the_network_as_it_was():
    model, calls = float_net(), []

    def failing(logits, labels):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return cross_entropy(logits, labels)

    state = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        loss_slice(model, *batch(), points=3, loss=failing)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and model.training


class TwoHeads(nn.Module):
    """The second head is used in training alone."""

    def __init__(self):
        super().__init__()
        self.head, self.other = nn.Linear(72, 3), nn.Linear(72, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x) + self.other(x) if self.training else self.head(x)


def test_a_layer_that_does_not_run_is_left_out():
    model, (images, labels) = quantized(TwoHeads().train()), batch()
    assert loss_slice(model, images, labels, points=3).center == cross_entropy(model.eval()(images), labels).item()


def test_progress_is_logged(caplog, monkeypatch):
    ticks = iter(range(0, 1000, 6))
    monkeypatch.setattr("bitscape.progress.time.monotonic", lambda: next(ticks))
    with caplog.at_level("INFO", logger="bitscape.progress"):
        loss_slice(float_net(), *batch(), points=3)
    assert caplog.messages[-1].startswith("loss slice: point 8/9")


def test_bad_input_is_named():
    model, (images, labels) = small_net(), batch()
    for points in (1, 4, 0, -3):
        with pytest.raises(BitscapeError, match=f"points = {points}: .* an odd number"):
            loss_slice(model, images, labels, points=points)
    for span in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BitscapeError, match=f"span = {span}"):
            loss_slice(model, images, labels, span=span)
    for ball in (Ball(clips=True), Ball(adaptive=True), Ball(weights="independent")):
        with pytest.raises(BitscapeError, match="without clips and adaptive"):
            loss_slice(model, images, labels, ball=ball)
    with pytest.raises(BitscapeError, match="12 images, 11 labels"):
        loss_slice(model, images, labels[:11])
    with pytest.raises(BitscapeError, match="is nan on these images"):
        loss_slice(model, images * torch.nan, labels)
    with pytest.raises(BitscapeError, match="none of the 0 members"):
        loss_slice(model.requires_grad_(False), images, labels)
