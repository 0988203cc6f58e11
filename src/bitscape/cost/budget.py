"""Budgets: one or several caps on a policy's cost, written as people say them.

"bitops=3.9e8"  "bitops=34.7G"        absolute
"weight_bytes=1.2MB"  "64KiB"         absolute; kB, MB, GB are powers of 1000, KiB, MiB, GiB powers of 1024
"bitops=0.25x"                        a fraction of the cost with every layer at 8 bits
"bitops=w4a4"  "weight_bytes=w4"      the cost of that uniform policy, with the pinned layers at their own bits
"4bit"  "weight_bytes=4bit"           the bytes of 4-bit weights in every layer, pinned ones included
"mean_weight_bits=4"                  a mean, in bits
"drop=0.5"                            how far the measured metric may fall below the float network's; of a search alone
"latency_ms=2.5"  "latency_ms=0.9x"   milliseconds; the network must have a latency table (`latency.with_latency`)
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

from bitscape.cost.layers import NO_EFFECT, NetworkProfile
from bitscape.cost.policy_cost import CAPS, NO_TABLE, cap, cost
from bitscape.errors import BitscapeError, nearest
from bitscape.policy import MAX_BITS, LayerBits, Policy, uniform_policy

_EXAMPLES = '"4bit", "bitops=0.25x", "bitops=w4a4", "bitops=3.9e8", "weight_bytes=1.2MB", "mean_weight_bits=4"'
DROP = "drop"
"""Of a budget: no cost, but how much of the metric may be lost."""
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SUFFIXES = {"": _DECIMAL, "bytes": _BYTES, "bits": {"": 1}, "ms": {"": 1, "ms": 1}}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?|[0-9]+\.)\s*([a-z]*)")
_EVERY_LAYER = re.compile(r"([0-9.]{1,9})\s*bits?")
_UNIFORM = re.compile(r"(?:w([0-9]{1,9}))?(?:a([0-9]{1,9}))?")
"""`int` fails on thousands of digits."""


@dataclass(frozen=True)
class Budget:
    """Caps that a policy must all stay within."""

    caps: Mapping[str, float] = field(default_factory=dict)
    """Kind of cost -> the largest cost allowed, absolute."""

    def limits(self, network: NetworkProfile) -> dict[str, int]:
        """Return the caps as exact integers, in the units of `policy_cost.layer_cost`."""
        return {kind: cap(kind).limit(network, value) for kind, value in self.caps.items()}

    def exceeded(self, network: NetworkProfile, policy: Policy) -> dict[str, float]:
        """Return the kinds whose cap `policy` exceeds, with what it costs; empty when it fits."""
        costs = {kind: cost(kind, network, policy) for kind in self.caps}
        return {kind: value for kind, value in costs.items() if value > self.caps[kind]}


def parse_budget(
    texts: str | Iterable[str] | Mapping[str, float | str],
    network: NetworkProfile,
    pinned: Mapping[str, LayerBits] | None = None,
    activations: Mapping[str, int] | None = None,
) -> Budget:
    """Turn budget texts into absolute caps for `network`.

    `texts` is one text ("bitops=0.25x", several separated by commas), several of them, or a mapping from kind to a
    number or to the text after "=". `pinned` holds the bits of layers that the form "w4a4" leaves as they are, `activations`
    those of the inputs of layers whose weights alone it sets.
    Raises BitscapeError naming the kind, the value and examples; for `latency_ms` also if the network has no latency table.
    """
    entries = _checked(texts, has_latency=network.has_latency)
    return Budget({kind: _absolute(kind, value, network, pinned or {}, activations or {}) for kind, value in entries})


def budget_kinds(texts: str | Iterable[str] | Mapping[str, float | str], *, has_latency: bool) -> list[str]:
    """Return the kinds of cost that a budget caps. Raises BitscapeError as `check_form` does."""
    return [kind for kind, _ in _checked(texts, has_latency=has_latency)]


BudgetText = str | Iterable[str] | Mapping[str, float | str]


def lasting(texts: BudgetText) -> BudgetText:
    """Return texts that can be gone through again: those of a generator as a tuple."""
    return tuple(texts) if isinstance(texts, Iterator) else texts


def split_drop(texts: BudgetText) -> tuple[float | None, dict[str, float | str]]:
    """Return the drop that a budget allows, None without one, and its caps by kind.

    Raises BitscapeError for a drop that is no positive number.
    """
    texts = lasting(texts)
    entries = _entries(texts)
    drops = [value for kind, value in entries if kind == DROP]
    caps = {kind: value for kind, value in entries if kind != DROP}
    if len(caps) + len(drops) < len(entries) or len(drops) > 1:
        check_form(texts, has_latency=True)  # says which kind is given twice
    if not drops:
        return None, caps
    try:
        drop = float(drops[0])
    except ValueError:
        drop = math.nan
    if not 0 < drop < math.inf:
        raise BitscapeError(
            f"budget {DROP}={drops[0]!r}: give a positive number in units of the metric, e.g. drop=0.5 for half a point of top-1"
        )
    return drop, caps


def check_form(texts: str | Iterable[str] | Mapping[str, float | str], *, has_latency: bool) -> None:
    """Raise BitscapeError for texts that no network could make a budget of; see `parse_budget`."""
    _checked(texts, has_latency=has_latency)


def _checked(texts: BudgetText, *, has_latency: bool) -> list[tuple[str, float | str]]:
    texts = lasting(texts)
    entries = _entries(texts)
    kinds = [kind for kind, _ in entries]
    for kind, value in entries:
        if kind == DROP and kinds.count(DROP) < 2:
            raise BitscapeError(f"budget {DROP}={value!r}: a drop is measured, by search alone; here give caps, e.g. {_EXAMPLES}")
        if kind not in CAPS and kind != DROP:
            known = f"kinds: {', '.join(CAPS)}{nearest(kind, CAPS)}"
            raise BitscapeError(f"budget kind {kind!r} is unknown; {known}; examples: {_EXAMPLES}")
        if kind != DROP and CAPS[kind].measured and not has_latency:
            raise BitscapeError(f"budget {kind}={value!r}: {NO_TABLE}")
        if kind != DROP:
            _read(kind, value)
    for kind, value in reversed(entries):
        if kinds.count(kind) > 1:
            raise BitscapeError(f"budget gives {kind} twice, the second time as {value!r}; give each kind once")
    if not entries:
        raise BitscapeError(f"budget={texts!r} holds no cap; examples: {_EXAMPLES}")
    return entries


def _entries(texts: str | Iterable[str] | Mapping[str, float | str]) -> list[tuple[str, float | str]]:
    if isinstance(texts, Mapping):
        return list(texts.items())
    listed = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str | bytes) else [texts]
    for text in listed:
        if not isinstance(text, str):
            raise BitscapeError(f'budget: {text!r} is no text; give caps such as "bitops=0.25x", or a mapping from kind to value')
    return [_entry(part.strip()) for text in listed for part in text.split(",") if part.strip()]


def _entry(text: str) -> tuple[str, str]:
    kind, equals, value = text.partition("=")
    if not equals and _EVERY_LAYER.fullmatch(text.lower()):
        return "weight_bytes", text
    if not equals:
        raise BitscapeError(f"budget {text!r} is not of the form kind=value; examples: {_EXAMPLES}")
    return kind.strip(), value.strip()


def _absolute(
    kind: str, value: float | str, network: NetworkProfile, pinned: Mapping[str, LayerBits], activations: Mapping[str, int]
) -> float:
    form = _read(kind, value)
    if isinstance(form, LayerBits):
        everywhere = _EVERY_LAYER.fullmatch(str(value).strip().lower())
        fixed = {name: replace(form, activation=bits) for name, bits in activations.items()} | dict(pinned)
        absolute = cost(kind, network, _uniform(network, form, {} if everywhere else fixed))
    else:
        number, is_fraction = form
        absolute = number * cost(kind, network, _uniform(network, LayerBits(8, 8), {})) if is_fraction else number
    if not math.isfinite(absolute) or absolute <= 0:
        raise BitscapeError(f"budget {kind}={value!r} is not a positive amount; {_forms(kind)}")
    return absolute


def _read(kind: str, value: object) -> LayerBits | tuple[float, bool]:
    """The bits of a uniform policy, or a positive number and whether it is a fraction of the 8-bit cost."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if everywhere := _EVERY_LAYER.fullmatch(text):
        return _bits_of_every_layer(kind, text, everywhere.group(1))
    if text and (uniform := _UNIFORM.fullmatch(text)):
        return _uniform_bits(kind, text, uniform.group(1), uniform.group(2))
    form: tuple[float, bool] | None = None
    if isinstance(value, Real) and not isinstance(value, bool):
        form = float(value), False
    elif number := _NUMBER.fullmatch(text):
        amount, suffix, units = float(number.group(1)), number.group(2), _SUFFIXES[CAPS[kind].unit]
        form = (amount, True) if suffix == "x" else (amount * units[suffix], False) if suffix in units else None
    if form is None or not math.isfinite(form[0]) or form[0] <= 0:
        raise BitscapeError(f"budget {kind}={value!r} is not a positive amount; {_forms(kind)}")
    return form


def _uniform(network: NetworkProfile, bits: LayerBits, pinned: Mapping[str, LayerBits]) -> Policy:
    """The uniform policy as a search would write it: layers that are never called have 8 bits, too."""
    names = [*network.by_name, *network.uncalled]
    return uniform_policy(names, bits, {**dict.fromkeys(network.uncalled, NO_EFFECT), **pinned})


def _bits_of_every_layer(kind: str, text: str, width: str) -> LayerBits:
    if kind != "weight_bytes":
        raise BitscapeError(f"budget {kind}={text!r}: that form counts bytes, weight_bytes={text}; {_forms(kind)}")
    if not width.isdecimal() or not 1 <= int(width) <= MAX_BITS:
        raise BitscapeError(f"budget {kind}={text!r}: bits must be a whole number from 1 to {MAX_BITS}; {_forms(kind)}")
    return LayerBits(int(width), MAX_BITS)


def _uniform_bits(kind: str, text: str, weight: str | None, activation: str | None) -> LayerBits:
    given = {"weight": weight, "activation": activation}
    missing = sorted(width for width in CAPS[kind].depends_on if given[width] is None)
    if missing:
        raise BitscapeError(f"budget {kind}={text!r} does not say the {' and '.join(missing)} bits; {_forms(kind)}")
    widths = [int(width or 8) for width in (weight, activation)]
    if not all(1 <= width <= MAX_BITS for width in widths):
        raise BitscapeError(f"budget {kind}={text!r}: bits must be from 1 to 8; {_forms(kind)}")
    return LayerBits(*widths)


def _forms(kind: str) -> str:
    """Name the ways to write a cap of this kind."""
    number = {"": "3.9e8 or 34.7G", "bytes": "65536, 64kB or 1.2MB", "bits": "4 or 3.5", "ms": "2.5 or 2.5ms"}[CAPS[kind].unit]
    uniform = "".join(f"{width[0]}4" for width in ("weight", "activation") if width in CAPS[kind].depends_on)
    every = ", or 4bit, the bytes of 4-bit weights in every layer" if kind == "weight_bytes" else ""
    return f"write {kind}= a number ({number}), a fraction of the 8-bit cost (0.25x) or a uniform policy ({uniform}){every}"
