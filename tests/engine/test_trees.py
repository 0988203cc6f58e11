from collections import Counter

import pytest
import torch

from bitscape.engine.trees import packed, unpacked
from bitscape.errors import BitscapeError


def test_what_is_taken_apart_comes_back() -> None:
    tree = {
        0: {"step": torch.tensor(3.0), "none": None, "betas": (0.9, 0.999), "rate": float("inf")},
        "old": [torch.zeros(2), [True, "x"]],
        "milestones": Counter([1, 1, 4]),
    }
    tensors, plain = packed(tree, "optimizer")
    assert list(tensors) == ["optimizer.0.step", "optimizer.old.0"]
    back = unpacked(plain, tensors)
    assert list(back) == [0, "old", "milestones"] and back[0]["betas"] == (0.9, 0.999)
    assert back[0]["step"] is tree[0]["step"] and back["old"][0] is tree["old"][0] and back["old"][1] == [True, "x"]
    assert isinstance(back["milestones"], Counter) and back["milestones"] == tree["milestones"]


def test_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(BitscapeError, match=r"optimizer\.state\.0 is a object, which a checkpoint cannot store"):
        packed({"state": [object()]}, "optimizer")


@pytest.mark.parametrize("damaged", [{"kind": 1}, {"tensor": "x"}, {}, {"mapping": [1]}])
def test_what_was_not_taken_apart_is_refused(damaged: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        unpacked(damaged, {})
