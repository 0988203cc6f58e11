import copy

import pytest
import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.models.memory_format import set_memory_format
from tests.networks import CALLED

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, tail) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), tail
        self.deep, self.line = nn.Conv3d(8, 8, 1), nn.Conv1d(8, 8, 1)
        self.register_buffer("anchors", torch.ones(1, 3, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.norm(self.stem(x)))


TAKES = {
    "flatten": lambda net, x: x.flatten(1),
    "conv3d": lambda net, x: net.deep(x[:, :, None]) * net.anchors.mean(),
    "conv1d": lambda net, x: net.line(x.flatten(2)),
    "dropout in training": lambda net, x: nn.functional.dropout(x, 0.5, net.training),
}
REFUSES = {
    "view": (lambda net, x: x.view(len(x), -1), "view size"),
    "view in training": (lambda net, x: x.view(len(x), -1) if net.training else x, "view size"),
    "strides": (lambda net, x: x.as_strided((len(x), 8), (512, 64)), "other outputs"),
    "storage order": (lambda net, x: x.permute(0, 2, 3, 1).is_contiguous() * x, "other outputs"),
}


def is_channels_last(net: Net) -> bool:
    return net.stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", TAKES)
@pytest.mark.parametrize("training", [False, True])
def test_a_network_that_takes_channels_last_gets_it_and_stays_the_same(kind, training):
    net = Net(TAKES[kind]).train(training)
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert set_memory_format(net, IMAGES, None, training=True)
    assert is_channels_last(net) and net.training == training and net.stem.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not set_memory_format(net, IMAGES, False)
    assert net.stem.weight.is_contiguous() and not is_channels_last(net)


@pytest.mark.parametrize("kind", REFUSES)
def test_a_network_that_does_not_take_channels_last_stays_contiguous(kind):
    tail, reason = REFUSES[kind]
    net = Net(tail).eval()
    assert not set_memory_format(net, IMAGES, None, training=True)
    assert net.stem.weight.is_contiguous() and not is_channels_last(net)
    with pytest.raises(BitscapeError, match=f"channels_last: True, but the network does not take.*{reason}.*leave channels_last out"):
        set_memory_format(net, IMAGES, True, training=True)


def test_a_view_in_training_alone_is_no_obstacle_where_nothing_is_trained():
    assert set_memory_format(Net(REFUSES["view in training"][0]), IMAGES, None)


def test_a_network_that_fails_in_any_format_is_left_to_its_caller():
    net = Net(TAKES["flatten"])
    assert set_memory_format(net, IMAGES[:, :1], True) and is_channels_last(net)


def test_training_mode_that_fails_in_any_format_is_no_obstacle():
    def tail(net: Net, x: Tensor) -> Tensor:
        if net.training:
            raise RuntimeError("needs targets")
        return x

    assert set_memory_format(Net(tail), IMAGES, None, training=True)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), nn.Conv1d(3, 2, 1)])
def test_without_2d_convolutions_there_is_nothing_to_lay_out(model):
    assert not set_memory_format(model, IMAGES, None)


def test_all_images_of_a_network_of_several_inputs_are_laid_out():
    network, inputs = CALLED["keywords"].network(), CALLED["keywords"].inputs(4)
    assert set_memory_format(network, inputs, None)
    assert network.conv[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not set_memory_format(network, {"features": inputs["features"], "image": inputs["image"]}, False)
