from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.models.named_outputs import named_outputs, returning_by_name

A, B, C = (torch.full((2,), float(value)) for value in range(3))


class Detected(NamedTuple):
    boxes: Tensor
    scores: Tensor


@dataclass
class Segmented:
    masks: Tensor
    loss: Tensor | None = None


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (A, {"output0": A}),
        ((A, B), {"output0": A, "output1": B}),
        ([A], {"output0": A}),
        ((None, B), {"output1": B}),
        ({"scores": A, "boxes": B}, {"scores": A, "boxes": B}),
        ({"boxes": [A, B], "scores": C}, {"boxes.0": A, "boxes.1": B, "scores": C}),
        ((A, {"mask": B, "levels": (C,)}), {"output0": A, "output1.mask": B, "output1.levels.0": C}),
        (((A, B), C), {"output0.0": A, "output0.1": B, "output1": C}),
        (Detected(A, B), {"boxes": A, "scores": B}),
        ({"head": Detected(A, B)}, {"head.boxes": A, "head.scores": B}),
        (Segmented(A), {"masks": A}),
        (OrderedDict(logits=A, size=3, name="x"), {"logits": A}),
        ({0: A, 1: B}, {"output0": A, "output1": B}),
    ],
    ids=str,
)
def test_names(returned, expected):
    outputs = named_outputs(returned)
    assert list(outputs) == list(expected)
    assert all(outputs[name] is tensor for name, tensor in expected.items())
    assert named_outputs(outputs) == outputs  # flat ones keep their names


@pytest.mark.parametrize("returned", [None, 1.0, (), {"a": None}, "text"], ids=str)
def test_a_network_that_returns_no_tensor_is_refused(returned):
    with pytest.raises(BitscapeError, match=rf"returns no tensor but {type(returned).__name__}; return tensors"):
        named_outputs(returned)


def test_names_that_coincide_are_refused():
    with pytest.raises(BitscapeError, match=r"two of its outputs are called 'a\.b'"):
        named_outputs({"a": {"b": A}, "a.b": B})


class Returning(nn.Module):
    def forward(self, pixels):
        return (pixels, [pixels + 1])


def test_a_network_returns_by_name_within_the_block():
    network = Returning()
    with returning_by_name(network):
        assert list(network(A)) == ["output0", "output1.0"]
    assert isinstance(network(A), tuple) and "forward" not in vars(network)


def test_a_tensor_is_returned_as_it_is_and_a_forward_of_the_instance_is_kept():
    network = nn.Identity()
    network.forward = own = lambda x: x + 1
    with returning_by_name(network), torch.no_grad():
        assert torch.equal(network(A), A + 1)
    assert network.forward is own
