from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bitscape.nested import tensors_by_path, tensors_in

A, B = torch.zeros(1), torch.ones(1)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Fields:
    first: Tensor
    rest: object = None


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (A, [()]),
        ((A, [B, None]), [(0,), (1, 0)]),
        (Pair(A, B), [("first",), ("second",)]),
        (OrderedDict(x=A, y={"z": B}), [("x",), ("y", "z")]),
        (Fields(A, Fields(B)), [("first",), ("rest", "first")]),
        (Fields, []),
        ("text", []),
    ],
    ids=str,
)
def test_tensors_are_found_in_every_structure(value, paths):
    assert [path for path, _ in tensors_by_path(value)] == paths
    assert list(tensors_in(value)) == [A, B][: len(paths)]
