import itertools
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from bitscape.errors import (
    BitscapeError,
    check_choices,
    explained_forward,
    first_repeated,
    nearest,
    one_line,
    prefixed,
    printable,
    printable_lines,
)


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


class Counted:
    """Equal to what has the same number; counts how often it is compared."""

    compared = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return isinstance(other, Counted) and self.number == other.number


def test_what_is_repeated_is_found_in_linear_time():
    items = [Counted(number) for number in (*range(10_000), 9_999)]
    assert first_repeated(items) is items[-1]
    assert Counted.compared < 100
    assert first_repeated("abcbc") == "b"
    assert first_repeated("abc") is None


def test_long_messages_lose_their_middle():
    message = str(BitscapeError("policy.json: the layer is " + "x" * 50_000_000 + "; search again"))
    assert message.startswith("policy.json: the layer is xxx") and message.endswith("xxx; search again")
    assert "[... 49,998,040 characters ...]" in message and len(message) < 2_100
    assert str(BitscapeError("x" * 2_000)) == "x" * 2_000


def test_a_message_is_cut_again_where_a_name_is_put_before_it():
    with pytest.raises(BitscapeError) as error, prefixed("policy.json"):
        raise BitscapeError("x" * 10_000)
    assert str(error.value).startswith("policy.json: xxx") and len(str(error.value)) < 2_100


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\r\nb\tc\0", r"a\r\nb\tc\x00"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202egnp.exe\u2066\u200f", r"\u202egnp.exe\u2066\u200f"),
        ("\u2028\ud800\ufeff", r"\u2028\ud800\ufeff"),
        ("größer \u00a0 日本 👩\u200d💻", "größer \u00a0 日本 👩\u200d💻"),
    ],
)
def test_what_acts_on_a_terminal_is_written_as_an_escape(text, shown):
    assert printable(text) == str(BitscapeError(text)) == one_line(text) == shown


def test_nearest_compares_a_bounded_number_of_names_of_bounded_length():
    many = (f"layer{number}" for number in itertools.count())
    assert nearest("layer77", many).startswith("; nearest: layer77, ")
    assert next(many) == "layer10000"
    assert nearest("x" * 1_000_000, ["x" * 1_000_000]) == ""
    assert nearest("conv", ["x" * 1_000_000, "conv1"]) == "; nearest: conv1"


def test_line_feeds_and_tabs_stay_in_text_of_several_lines():
    assert printable_lines("one\n\ttwo\r\x1b[m") == "one\n\ttwo\\r\\x1b[m"


def test_shapes_of_several_inputs_are_told_and_wrong_arguments_explained() -> None:
    inputs = {"image": torch.zeros(2, 3), "pair": (torch.zeros(4, dtype=torch.int64), None)}
    expected = (
        r"^inputs: the network fails on a batch of dict \(image: shape \(2, 3\), torch.float32; pair: tuple \(0: shape \(4,\), "
        r"torch.int64; 1: NoneType \(\)\)\): unexpected; check channels"
    )
    with pytest.raises(BitscapeError, match=expected), explained_forward(inputs):
        raise RuntimeError("unexpected")
    with pytest.raises(BitscapeError, match=r"a tuple holds the arguments of its forward"), explained_forward(inputs):
        raise TypeError("takes 2 positional arguments but 3 were given")
