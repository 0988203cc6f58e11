import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pytest

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.signatures import check_fields, checked


@runtime_checkable
class Named(Protocol):
    name: str


class Thing:
    name = "thing"


@checked
def act(
    anything: Any = None,
    *,
    number: int = 1,
    share: float = 0.5,
    flag: bool | None = None,
    word: Literal["one", "two"] | int = "one",
    names: Sequence[str | type[Thing]] = (),
    pins: Mapping[str, int] | None = None,
    named: Named | None = None,
    function: Callable[[int], int] | None = None,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
) -> str:
    """Do nothing."""
    return "done"


@pytest.mark.parametrize(
    "given",
    [
        {"number": np.int64(3)},
        {"share": 1},
        {"share": np.float32(0.5)},
        {"flag": True},
        {"word": "three"},  # which texts there are is said where the text is read
        {"word": 2},
        {"names": ["a", Thing]},
        {"paths": (name for name in "ab")},
        {"pins": {"a": 1}},
        {"named": Thing()},
        {"function": len},
        {"function": tuple},
        {"paths": "a"},
        {"anything": object()},
    ],
)
def test_values_of_the_annotated_types_pass(given):
    assert act(**given) == "done"


def test_what_can_be_gone_through_once_is_no_sequence():
    with pytest.raises(BitscapeError, match="it must be a list"):
        act(names=iter("ab"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"number": None}, "number=None: it must be a whole number"),
        ({"number": True}, "number=True: it must be a whole number"),
        ({"number": 2.5}, "number=2.5: it must be a whole number"),
        ({"share": "1"}, "share='1': it must be a number"),
        ({"flag": 1}, "flag=1: it must be True, False or None"),
        ({"word": None}, "word=None: it must be 'one', 'two' or a whole number"),
        ({"names": "ab"}, "names='ab': it must be a list (each entry a text or a class)"),
        ({"names": [3]}, "names=[3]: it must be a list (each entry a text or a class)"),
        (
            {"pins": {"a": "b"}},
            "pins={'a': 'b'}: it must be a mapping from a text to a whole number or None",
        ),
        ({"named": 3}, "named=3: it must be a Named or None"),
        ({"function": 3}, "function=3: it must be a function or None"),
        (
            {"paths": [3]},
            "paths=[3]: it must be a text, a PathLike or a list (each entry a text or a PathLike)",
        ),
    ],
)
def test_values_of_other_types_are_refused_by_name(given, said):
    with pytest.raises(BitscapeError) as raised:
        act(**given)
    assert str(raised.value) == said


def test_a_class_in_place_of_a_value_is_refused():
    with pytest.raises(BitscapeError, match="it must be a Named or None"):
        act(named=Thing)


def test_an_unknown_argument_is_an_error_of_the_call():
    with pytest.raises(TypeError, match="unexpected keyword argument 'nubmer'"):
        act(nubmer=1)


def test_fields_are_checked_alike():
    @dataclass
    class Settings:
        count: int = 1

        def __post_init__(self):
            check_fields(self)

    assert Settings(3).count == 3
    with pytest.raises(BitscapeError, match=r"^count='3': it must be a whole number$"):
        Settings("3")


VERBS = ("analyze", "compress", "evaluate", "export", "gain", "quantize", "search", "train")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_checks_its_arguments(name):
    verb = getattr(bs, name)
    parameters = inspect.signature(verb).parameters.values()
    required = {each.name: None for each in parameters if each.default is each.empty}
    required.pop("settings", None)
    with pytest.raises(BitscapeError, match=r"^(model|network)=None: it must be a Module$"):
        verb(**required)
