import torch
from torch import nn

from bitscape.tuning.blocks import find_blocks
from tests.tuning.small import Residual, float_net, images, quantized


class Twice(nn.Module):
    """A layer that runs twice, one that takes a keyword, and two blocks with an addition between them."""

    def __init__(self):
        super().__init__()
        self.twice, self.keyword = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.blocks = nn.ModuleList([Residual(3), Residual(3)])

    def forward(self, x):
        x = self.keyword(input=self.twice(self.twice(x)))
        x = self.blocks[1](self.blocks[0](x) + 1)
        return x.mean((2, 3))


def test_blocks_are_residual_blocks_and_single_layers_in_the_order_of_calls():
    network = quantized(float_net())
    blocks = find_blocks(network, images(2))
    assert [block.name for block in blocks] == ["0", "1.0", "1.1", "4"]
    assert [block.module for block in blocks] == [network[0], *network[1], network[4]]
    assert [block.follows for block in blocks] == [False, True, True, False]
    assert blocks[0].sample_bytes == 4 * (3 * 6 * 6 + 4 * 4 * 4)


def test_layers_that_no_block_holds_are_left_out():
    blocks = find_blocks(quantized(Twice().eval()), images(2))
    assert [(block.name, block.follows) for block in blocks] == [("blocks.0", False), ("blocks.1", False)]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return (self.last(self.first(x).relu_()),)


def test_what_was_changed_in_place_does_not_follow():
    blocks = find_blocks(quantized(InPlace().eval()), images(2))
    assert [(block.name, block.follows) for block in blocks] == [("first", False), ("last", False)]


def test_a_network_of_few_layers_is_one_block():
    network = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval())
    (block,) = find_blocks(network, images(2))
    assert block.name == "" and block.module is network
    torch.testing.assert_close(block.sample_bytes, 4 * (3 * 36 + 2 * 16))
