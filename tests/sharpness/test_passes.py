import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitscape.sharpness.ball import Ball
from bitscape.sharpness.passes import random_state, repeating
from tests.sharpness.small import batch, gradients, same, small_net


def buffers_of(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def test_batch_norms_use_the_batch_and_count_nothing():
    model = small_net()
    images, _ = batch()
    norm_input = []
    model[1].register_forward_hook(lambda _m, inputs, out: norm_input.append((inputs[0].detach(), out.detach())))
    before = buffers_of(model)
    with repeating(model, random_state(model)):
        model(images)
    assert same(buffers_of(model), before)
    ((x, y),) = norm_input
    by_hand = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + model[1].eps).sqrt()
    torch.testing.assert_close(y, by_hand)
    model(images)
    assert int(model[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 1
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_batch_norms_in_eval_mode_and_those_without_statistics_stay_so():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    model[0].eval()
    images, _ = batch()
    expected = model(images)
    with pytest.raises(KeyError), repeating(model, random_state(model)):
        assert torch.equal(model(images), expected)
        raise KeyError
    assert [m.track_running_stats for m in model] == [True, False]


def test_dropout_draws_the_same_masks_and_the_stream_goes_on_as_after_one_pass():
    model, (images, _) = small_net(dropout=0.5), batch()
    torch.manual_seed(3)
    state = random_state(model)
    first = model(images)
    following = torch.rand(4)
    other = model(images)
    with repeating(model, state):
        again = model(images)
    assert torch.equal(again, first) and not torch.equal(other, first)
    assert torch.equal(torch.rand(4), following)


def test_a_second_pass_of_radius_0_ends_where_one_pass_does():
    model, (images, labels) = small_net(dropout=0.5), batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = cross_entropy(twin(images), labels)
    expected.backward()
    torch.manual_seed(3)
    state = random_state(model)
    with Ball().watched(model) as ascent:
        cross_entropy(model(images), labels).backward()
    model.zero_grad()
    with repeating(model, state), ascent.applied(0.0):
        value = cross_entropy(model(images), labels)
        value.backward()
    assert torch.equal(value, expected) and same(gradients(model), gradients(twin))
    assert same(buffers_of(model), buffers_of(twin))


class Tracker(nn.Module):
    """Keeps a mean in place and a count as a new tensor, and uses both; shares the mean with another module."""

    def __init__(self, shared=None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1) if shared is None else shared)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.count = self.count + 1
        self.mean.mul_(0.5).add_(x.detach().mean())
        return x * self.mean + self.count


def test_every_running_statistic_is_held_back():
    tracker = Tracker()
    model = nn.Sequential(
        nn.InstanceNorm2d(2, track_running_stats=True, affine=True),
        nn.BatchNorm2d(2, momentum=None),
        tracker,
        Tracker(tracker.mean),
        nn.utils.spectral_norm(nn.Conv2d(2, 2, 3)),
    )
    images, _ = batch()
    identities, before = dict(model.named_buffers()), buffers_of(model)
    with pytest.raises(KeyError), repeating(model, random_state(model)):
        first = model(images)
        assert not same(buffers_of(model), before)
        assert model[2].mean is model[3].mean
        raise KeyError
    assert same(buffers_of(model), before)
    assert all(buffer is identities[name] for name, buffer in model.named_buffers())
    assert model[3].mean is tracker.mean and model[2].nothing is None
    assert torch.equal(model(images), first)


def test_a_backward_pass_may_follow_later():
    model, (images, labels) = small_net(), batch()
    with repeating(model, random_state(model)):
        loss = cross_entropy(model(images), labels)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    cross_entropy(model(images), labels).backward()
    assert same(found, gradients(model))
