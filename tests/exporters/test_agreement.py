import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.exporters.agreement import Agreement, Comparison, compare_outputs, computed_otherwise, require_equal, require_same
from bitscape.exporters.integer.execution import run_integers
from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from tests.exporters.networks import images, quantized


def compared(*batches):
    comparison = Comparison()
    for expected, actual in batches:
        count = len(next(iter(expected.values())))
        comparison.add(count, *({name: np.asarray(values) for name, values in each.items()} for each in (expected, actual)))
    return comparison.result()


def floats(*rows):
    return np.array(rows, np.float32)


def test_scores_by_hand_over_two_batches():
    first = {"scores": floats([3, 0], [0, 4])}, {"scores": floats([3, 0], [4, 0])}
    second = {"scores": floats([0, 5])}, {"scores": floats([0, 5])}
    found = compared(first, second)["scores"]
    assert (found.images, found.same_class, found.identical) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.difference == pytest.approx(np.sqrt(32 / 50))


def test_each_output_is_compared_and_maps_have_no_classes():
    maps = np.ones((2, 3, 4, 4), np.float32)
    found = compared(({"map": maps, "one": floats([1], [2])}, {"map": maps * 1.5, "one": floats([1], [2])}))
    assert (found["map"].difference, found["map"].same_class, found["map"].identical) == (0.5, None, 0.0)
    assert (found["one"].difference, found["one"].same_class, found["one"].identical) == (0.0, None, 1.0)


def test_of_whole_numbers_and_truth_values_the_share_that_differs_counts():
    found = compared(({"index": [[7, 1000], [0, 5]], "keep": [True, False]}, {"index": [[7, 1], [0, 5]], "keep": [True, True]}))
    assert (found["index"].difference, found["index"].identical, found["index"].same_class) == (0.25, 0.5, None)
    assert found["keep"].difference == 0.5


def test_an_output_without_an_axis_of_images():
    comparison = Comparison()
    for actual in (floats([1, 2]), floats([1, 1])):
        comparison.add(4, {"anchors": floats([1, 2])}, {"anchors": actual})
    found = comparison.result()["anchors"]
    assert (found.images, found.identical, found.same_class) == (8, 0.5, None)
    assert found.difference == pytest.approx(np.sqrt(1 / 10))


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        (floats([-np.inf, 1]), floats([-np.inf, 1]), 0.0),
        (floats([np.nan, 1]), floats([np.nan, 1]), 0.0),
        (floats([np.nan, 1]), floats([0, 1]), np.inf),
        (floats([1, 1]), floats([np.nan, 1]), np.inf),
        (floats([-np.inf, 1]), floats([5, 1]), np.inf),
        (floats([0, 0]), floats([0, 0]), 0.0),
        (floats([0, 0]), floats([0, 1]), np.inf),
        (floats([1e-30, 0]), floats([2e-30, 0]), pytest.approx(1.0)),
    ],
)
def test_values_that_are_not_finite_and_values_near_zero(expected, actual, difference):
    assert compared(({"x": expected}, {"x": actual}))["x"].difference == difference


@pytest.mark.parametrize("actual", [{"x": np.zeros((2, 3))}, {"y": np.zeros((2, 2))}, {}])
def test_other_outputs_are_an_error(actual):
    with pytest.raises(BitscapeError, match=r"\(2, 2\)\} were expected"):
        Comparison().add(2, {"x": np.zeros((2, 2))}, actual)


def test_of_several_outputs_like_scores_none_is_taken_for_logits_unless_it_is_said():
    pair = {"boxes": floats([1, 2]), "scores": floats([2, 1])}
    for classes, expected in ((None, [None, None]), (True, [1.0, 1.0]), (False, [None, None])):
        comparison = Comparison(classes)
        comparison.add(1, pair, pair)
        assert [agreement.same_class for agreement in comparison.result().values()] == expected


@pytest.mark.parametrize(
    ("same_class", "difference", "refused"),
    [
        *[(1.0, 0.24, False), (1.0, 0.26, True), (0.8, 0.03, False), (0.75, 0.03, True), (0.75, 0.01, False)],
        *[(None, 0.24, False), (None, 0.26, True), (None, math.inf, True)],
    ],
)
def test_classes_that_hang_by_a_thread_may_change(same_class, difference, refused):
    agreement = Agreement(images=16, same_class=same_class, identical=0.0, difference=difference)
    assert computed_otherwise(agreement) == refused
    if refused:
        with pytest.raises(BitscapeError, match=r"some 1.0 computes output boxes otherwise than the file says"):
            require_same({"scores": dataclasses.replace(agreement, same_class=None, difference=0.0), "boxes": agreement}, "some 1.0")


class Answering:
    """A session whose outputs are those of exact integers, but for the classes of so many images."""

    def __init__(self, network: IntegerNetwork, wrong: int) -> None:
        self.network, self.wrong = network, wrong
        self.inputs, self.outputs = network.interface.names, network.interface.outputs

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (images,) = inputs.values()
        (scores,) = run_integers(self.network, torch.from_numpy(images)).values()
        values, (_, second) = (part.unbind(1) for part in scores[: self.wrong].topk(2))
        scores[torch.arange(self.wrong), second] = values[0] + 0.1
        return [scores.numpy()]


@pytest.mark.slow
def test_a_file_is_compared_with_exact_integers_and_with_the_network_before_the_export():
    torch.manual_seed(0)
    network = quantized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)), bits=[(4, 8)])
    integers = integer_network(network, images())
    exact, simulated = compare_outputs(integers, network, Answering(integers, 0), images(16, seed=5))
    assert (exact["output0"].difference, exact["output0"].same_class, exact["output0"].images) == (0.0, 1.0, 16)
    assert 0 < simulated["output0"].difference < 0.05
    exact, _ = compare_outputs(integers, network, Answering(integers, 4), images(16, seed=5))
    assert exact["output0"].same_class == 0.75


def test_networks_are_compared_bit_for_bit():
    network, other = nn.Linear(2, 2), nn.Linear(2, 2)
    require_equal(network, network, torch.ones(3, 2), "net.safetensors")
    with pytest.raises(BitscapeError, match=r"^net.safetensors: read back, its outputs differ"):
        require_equal(network, other, torch.ones(3, 2), "net.safetensors")
