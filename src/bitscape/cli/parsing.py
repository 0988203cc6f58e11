"""From the texts of options to values. Errors name the option, the text and how to write it."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from bitscape.errors import BitscapeError, nearest, prefixed
from bitscape.policy import MAX_BITS, LayerBits

if TYPE_CHECKING:
    from pathlib import Path

    from bitscape.data.batches import Normalization
    from bitscape.dynamic import Dqmq
    from bitscape.engine import Tracker
    from bitscape.searches.freedom import Pins
    from bitscape.searches.methods import SearchMethod
    from bitscape.steps import Plain, SharpSettings
    from bitscape.verbs.quantize import Repair

UNPINNED = "none"
MOST_DIGITS = 18
"""Of a whole number: it fits 64 bits. `int` fails on thousands of digits, with words that are of no use here."""


def parse_candidates(text: str) -> tuple[LayerBits, ...]:
    """Read "2,4,8" (the same for weights and activations) or "w=2,4,8;a=8" into all pairs."""
    halves = [part.rpartition("=") for part in text.replace(" ", "").split(";") if part]
    parts = {kind: widths for kind, _, widths in halves}
    if len(parts) != len(halves) or not (parts.keys() == {""} or parts.keys() == {"w", "a"}):
        raise BitscapeError(f"--candidates {text!r}: write e.g. 2,3,4,8 (weights and activations), or w=2,4,8;a=8")
    weights, activations = (_widths(text, parts.get(kind, parts.get("", ""))) for kind in ("w", "a"))
    with prefixed(f"--candidates {text!r}"):
        return tuple(LayerBits(w, a) for w, a in product(weights, activations))


def _widths(option: str, text: str) -> list[int]:
    try:
        widths = [int(width) for width in text.split(",")]
    except ValueError:
        raise BitscapeError(f"--candidates {option!r}: {text!r} is no list of bits; write e.g. 2,3,4,8") from None
    return list(dict.fromkeys(widths))


def parse_pins(texts: Iterable[str]) -> "Pins":
    """Read "name=8/8" texts; with "none" among them, the ends are not pinned by default."""
    from bitscape.searches.freedom import Pins

    texts = list(texts)
    return Pins(dict(_pin(text) for text in texts if text != UNPINNED), ends=UNPINNED not in texts)


def _pin(text: str) -> tuple[str, LayerBits]:
    name, _, bits = text.rpartition("=")
    if not name:
        raise BitscapeError(f"--pin {text!r}: write layer=weight/activation bits, e.g. conv1=8/8 or 'head*=8/8', or none")
    with prefixed(f"--pin {text!r}"):
        return name, LayerBits.parse(bits)


def parse_repair(
    word: "Repair | Literal['none'] | None", folder: "Path | None", *, has_policy: bool = True
) -> "Repair | None":
    """Read the word of --repair, "compensate" where nobody gave one.

    Raises BitscapeError for a word or a folder that would have no effect.
    """
    from bitscape.verbs.quantize import check_repair

    if not has_policy and (word is not None or folder is not None):
        raise BitscapeError(
            "--repair: a network is repaired when a --policy quantizes it; add --policy, or leave "
            "--repair and --repair-folder out"
        )
    repair = None if word == "none" else word or "compensate"
    with prefixed("--repair-folder"):
        check_repair(repair, folder)
    return repair


def is_whole(text: str) -> bool:
    """Whether the text is a whole number without a sign, of at most `MOST_DIGITS` digits."""
    return text.isdecimal() and len(text) <= MOST_DIGITS


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """Read "3x224x224" as channels, height and width."""
    if text is None:
        return None
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(is_whole(size) and int(size) for size in sizes):
        raise BitscapeError(f"--input-shape {text!r}: write channels, height and width of one image, e.g. 3x224x224")
    channels, height, width = map(int, sizes)
    return channels, height, width


def parse_normalization(text: str | None, source: str) -> "Normalization":
    """Read a name or "m,m,m/s,s,s"; without a text only the digits have an answer."""
    from bitscape.data.batches import CIFAR10, DIGITS, IMAGENET, UNIT, Normalization

    known = {"imagenet": IMAGENET, "cifar10": CIFAR10, "digits": DIGITS, "unit": UNIT}
    forms = f"{', '.join(known)}, model, or means/deviations such as 0.5,0.5,0.5/0.25,0.25,0.25"
    if text is None and source == "digits":
        return DIGITS
    if text is None:
        raise BitscapeError(f"--normalize is missing; give what the network was trained with: {forms}")
    if text in known:
        return known[text]
    try:
        mean, std = (tuple(float(value) for value in half.split(",")) for half in text.split("/"))
    except ValueError:
        raise BitscapeError(f"--normalize {text!r} is unknown{nearest(text, known)}; allowed are {forms}") from None
    return Normalization(mean, std)


def make_method(name: str, settings: Sequence[str]) -> "SearchMethod":
    """Build a search method from its name and "field=value" texts, checked against its own dataclass."""
    from bitscape.searches.methods import METHODS

    made: SearchMethod = _made("--method", name, METHODS, settings)
    return made


def make_step(name: str, settings: Sequence[str]) -> "Plain | SharpSettings | Dqmq":
    """Build a training step from its name and "field=value" texts, checked against its own dataclass."""
    made: Plain | SharpSettings | Dqmq = _made("--step", name, training_steps(), settings)
    return made


def training_steps() -> "dict[str, type[Plain] | type[SharpSettings] | type[Dqmq]]":
    """Name -> settings of every training step, at static bits and at those that images decide."""
    from bitscape.dynamic import Dqmq
    from bitscape.steps import STEPS

    return {**STEPS, "dqmq": Dqmq}


def make_trackers(texts: Iterable[str]) -> "list[Tracker]":
    """Build trackers from "tensorboard=folder" texts."""
    from bitscape.engine.trackers import TRACKERS

    pairs = [(text, *text.partition("=")[::2]) for text in texts]
    for text, name, where in pairs:
        if name not in TRACKERS or not where:
            raise BitscapeError(
                f"--tracker {text!r}: write e.g. tensorboard=runs/one{nearest(name, TRACKERS)}; allowed are {', '.join(TRACKERS)}"
            )
    return [TRACKERS[name](where) for _, name, where in pairs]


def parse_widths(text: str) -> tuple[int, int]:
    """Read "2-8" as the least and the largest width."""
    low, _, high = text.partition("-")
    if not (is_whole(low) and is_whole(high) and 1 <= int(low) < int(high) <= MAX_BITS):
        raise BitscapeError(f"--dynamic {text!r}: write the least and the largest width, from 1 to {MAX_BITS} bits, e.g. 2-8")
    return int(low), int(high)


def _made(option: str, name: str, kinds: Mapping[str, Any], settings: Sequence[str]) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if name not in kinds:
        raise BitscapeError(f"{option} {name!r} is unknown{nearest(name, kinds)}; allowed are {', '.join(kinds)}")
    fields = kinds[name].__dataclass_fields__
    given = dict(_setting(text, name, fields) for text in settings)
    try:
        return TypeAdapter(kinds[name]).validate_strings(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        given_text = f"{field}={first['input']}: " if field else ""  # a setting's own check names its field itself
        message = first["msg"].removeprefix("Value error, ")
        raise BitscapeError(f"--set {given_text}{message}; see `bitscape methods {name}`") from None


def _setting(text: str, method: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals:
        raise BitscapeError(f"--set {text!r}: write field=value, e.g. images=128")
    if field not in fields:
        has = f"it has {', '.join(fields)}" if fields else "it has no settings"
        raise BitscapeError(f"--set {text!r}: {method} has no field {field!r}{nearest(field, fields)}; {has}")
    return field, value
