import copy
import inspect
import pickle
from contextlib import contextmanager

import torch
from torch import nn

from bitscape.models.derived import forward_within

CALLS: list[str] = []


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(2))

    def forward(self, image, *, bias=0.5):
        """Of the class as written."""
        return image + self.shift + bias


@contextmanager
def outer(module):
    CALLS.append(f"outer {type(module).__name__}")
    yield


@contextmanager
def inner(module):
    CALLS.append(f"inner {type(module).__name__}")
    yield


def derived() -> nn.Module:
    module = Shifted()
    module.__class__ = forward_within(forward_within(Shifted, inner), outer)
    return module


def test_forward_runs_within_the_context_and_keeps_its_signature():
    CALLS.clear()
    assert torch.equal(derived()(torch.zeros(2), bias=1.0), torch.full((2,), 2.0))
    assert CALLS == ["outer Shifted", "inner Shifted"]
    assert list(inspect.signature(derived().forward).parameters) == ["image", "bias"]
    assert derived().forward.__doc__ == "Of the class as written."


def test_modules_are_pickled_and_copied_with_their_contexts():
    module = derived()
    with torch.no_grad():
        module.shift += 1
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        CALLS.clear()
        assert type(again) is type(module) and torch.equal(again(torch.zeros(2)), torch.full((2,), 2.5))
        assert CALLS == ["outer Shifted", "inner Shifted"]
