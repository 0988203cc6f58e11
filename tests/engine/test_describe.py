import json

import torch

from bitscape.engine import Sgd
from bitscape.engine.describe import describe
from tests.engine.tiny import tiny_batches, tiny_net


def test_equal_things_read_equal_and_different_ones_differ() -> None:
    assert describe(tiny_batches()) == describe(tiny_batches())
    assert describe(tiny_batches()) != describe(tiny_batches(seed=1))
    assert describe(tiny_net()) == describe(tiny_net())
    assert describe(tiny_net()) != describe(tiny_net(seed=1))


def test_everything_is_json() -> None:
    value = {"a": (Sgd(), tiny_net(), torch.bfloat16, len, None), "b": torch.tensor(1.0), "c": torch.zeros(0, 3)}
    assert json.loads(json.dumps(describe(value))) == describe(value)
    assert describe(len) == "len"


def test_large_tensors_are_sampled_along_their_whole_length() -> None:
    large = torch.zeros(3000, 1000, dtype=torch.uint8)
    other = large.clone()
    other[2000:] = 1
    assert describe(large) != describe(other)
