import pytest
import torch

from bitscape.errors import BitscapeError
from bitscape.export.containers import container, container_bytes, packed_bytes
from bitscape.export.integer_weights import IntegerWeight
from tests.export.networks import MIXED, integers


def of_bits(bits: int) -> IntegerWeight:
    return IntegerWeight(torch.tensor([-(2 ** (bits - 1))], dtype=torch.int16), torch.ones(1))


@pytest.mark.parametrize(("bits", "expected"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_the_smallest_that_holds_the_codes_is_chosen(bits, expected):
    assert container(of_bits(bits), (8, 2, 4)) == expected


def test_containers_that_do_not_serve_are_refused():
    with pytest.raises(BitscapeError, match=r"containers = \(2, 4\): weights need 8 bits; allow 8 as well"):
        container(of_bits(8), (2, 4))


@pytest.mark.parametrize(
    ("count", "bits", "expected"), [(0, 2, 0), (5, 2, 2), (3, 4, 2), (7, 8, 7), (8, 3, 3), (9, 3, 6), (4, 6, 3), (5, 6, 6)]
)
def test_bytes_by_hand(count, bits, expected):
    assert packed_bytes(count, bits) == expected


def test_scales_and_biases_count_four_bytes_each():
    _, network = integers("mobile", MIXED)
    chosen = dict.fromkeys(network.weights, 4)
    codes = sum(-(-weight.q.numel() // 2) for weight in network.weights.values())
    channels = [len(weight.q) for weight in network.weights.values()]
    assert len(network.biases) == len(channels)  # every layer has a norm or a bias
    assert container_bytes(network, chosen) == codes + 2 * 4 * sum(channels)
