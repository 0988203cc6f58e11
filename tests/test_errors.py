from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from bitscape.errors import BitscapeError, check_choices, explained_forward, nearest


def test_near_names_are_told_and_far_ones_are_not() -> None:
    assert nearest("conv", ["conv1", "head"]) == "; nearest: conv1"
    assert nearest("conv", ["zzz"]) == ""


def test_fields_with_choices_hold_one_of_them() -> None:
    @dataclass
    class Settings:
        way: Literal["up", 2] = "up"
        name: str = "any"

    check_choices(Settings(way=2, name="other"))
    with pytest.raises(BitscapeError, match="way = 'sideways': allowed are 'up', 2"):
        check_choices(Settings(way="sideways"))  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("wrong size\nstack"), "wrong size"), (NotImplementedError(), "NotImplementedError")],
)
def test_a_failing_network_is_told_with_the_batch(error: RuntimeError, words: str) -> None:
    message = rf"shape \(2, 3\), torch\.float32: {words}; check channels"
    with pytest.raises(BitscapeError, match=message), explained_forward(torch.zeros(2, 3)):
        raise error


def test_missing_memory_is_no_fault_of_the_images() -> None:
    with pytest.raises(RuntimeError, match="can't allocate"), explained_forward(torch.zeros(2, 3)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
