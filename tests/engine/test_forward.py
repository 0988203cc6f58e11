import torch
from torch import nn

from bitscape.engine.forward import samples_at_once


def test_a_pass_holds_as_many_samples_as_keep_the_largest_output_within_bounds(monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    images = torch.zeros(5, 3, 16, 16)
    largest = 8 * 16 * 16 * 4  # bytes of the first layer's output of one image
    monkeypatch.setattr("bitscape.engine.forward.OUTPUT_BYTES", 3 * largest)
    assert samples_at_once(network, images, 128) == 3
    assert samples_at_once(network, images, 2) == 2
    monkeypatch.setattr("bitscape.engine.forward.OUTPUT_BYTES", 1)
    assert samples_at_once(network, images, 128) == 2
    assert network.training and not network[0]._forward_hooks


def test_a_network_that_takes_no_two_samples_gets_the_whole_batch():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(5, 3)

    assert samples_at_once(Fixed(), torch.zeros(5, 3), 128) == 128


def test_the_trial_leaves_the_networks_state_alone():
    class Counting(nn.Module):
        seen = None

        def forward(self, x):
            self.seen = x
            return x

    network = Counting()
    samples_at_once(network, torch.zeros(5, 3), 128)
    assert network.seen is None
