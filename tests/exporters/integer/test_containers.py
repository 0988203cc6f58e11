from dataclasses import replace

import pytest
import torch

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.containers import container, container_bytes, layer_containers, packed_bytes, scale_bytes
from bitscape.exporters.integer.weights import IntegerWeight
from tests.exporters.networks import MIXED, integers


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
    codes = sum(weight.q.numel() for weight in network.weights.values())
    channels = [len(weight.q) for weight in network.weights.values()]
    assert len(network.biases) == len(channels)  # every layer has a norm or a bias
    assert scale_bytes(network) == 2 * 4 * sum(channels)
    assert container_bytes(network, (8,)) == codes + 2 * 4 * sum(channels)


def test_what_calls_of_a_layer_share_counts_once():
    _, network = integers("pyramid")
    codes = 8 * 3 * 9 + 8 * 8 * 9 + 4 * 8 + 5 * 16  # stem, tower, boxes, and the weight of the two tied layers
    scales = 8 + 4 * 8 + 4 + 5  # the tower's are those of four norms
    biases = 8 + 4 * 8 + 4 + 2 * 5
    assert container_bytes(network, (8,)) == codes + 4 * (scales + biases)


def test_a_layer_is_stored_in_the_widest_container_of_its_calls():
    _, network = integers("pyramid", MIXED)
    codes = network.weights["tower:2.weight"]
    narrow = replace(network, weights={**network.weights, "tower:2.weight": replace(codes, q=codes.q.clamp(-1, 1))})
    assert layer_containers(network, (2, 4, 8))["tower"] == layer_containers(narrow, (2, 4, 8))["tower"] == 4
    assert set(layer_containers(network, (2, 4, 8))) == {"stem", "tower", "boxes", "tied", "other"}
