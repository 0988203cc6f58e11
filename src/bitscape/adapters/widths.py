"""What another tool computes in place of the widths of a policy."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from bitscape.errors import BitscapeError, nearest
from bitscape.policy import FLOAT_BITS, Policy

_log = logging.getLogger("bitscape.adapters")
Rounding = Literal["exact", "up"]
Pair: TypeAlias = tuple[int, int]
"""Bits of weights and of activations."""
FLOAT: Pair = (FLOAT_BITS, FLOAT_BITS)


def offered_bits(
    policy: Policy, offers: Mapping[str, Sequence[Pair]], rounding: Rounding, tool: str
) -> dict[str, Pair]:
    """Give each layer of the policy a pair of widths that the tool has.

    Args:
        policy: bits of every layer.
        offers: layer -> pairs that the tool has for it.
        rounding: what becomes of a pair that the tool lacks. "exact": an error. "up": the next
            wider pair, where neither width is smaller; of several the one with the fewest
            activation bits, then with the fewest weight bits. What it changed is logged.
        tool: its name, for messages.

    Raises:
        BitscapeError: an unknown rounding, or a pair that the tool lacks.
    """
    if rounding not in get_args(Rounding):
        hint = nearest(str(rounding), get_args(Rounding))
        raise BitscapeError(f"rounding={rounding!r}: allowed are 'exact' and 'up'{hint}")
    pairs = {}
    for name, bits in policy.layers.items():
        wanted, offered = (bits.weight, bits.activation), offers[name]
        wider = [pair for pair in offered if pair[0] >= wanted[0] and pair[1] >= wanted[1]]
        chosen = min(wider, key=lambda pair: (pair[1], pair[0]), default=None)
        if chosen is None or (chosen != wanted and rounding == "exact"):
            raise BitscapeError(
                f"layer {name!r}: {tool} has no {written(wanted)} weight/activation bits for it, "
                f"only {', '.join(map(written, offered))}; {_next_step(chosen)}"
            )
        pairs[name] = chosen
    rounded = [
        name
        for name, bits in policy.layers.items()
        if pairs[name] != (bits.weight, bits.activation)
    ]
    if rounded:
        changes = [f"{name} {policy.layers[name]} -> {written(pairs[name])}" for name in rounded]
        _log.warning(
            "%s: %d of %d layers get wider bits: %s",
            tool,
            len(rounded),
            len(pairs),
            ", ".join(changes),
        )
    return pairs


def written(pair: Pair) -> str:
    """As in policy files and messages: "4/8", "4/float" or "float"."""
    texts = ["float" if bits == FLOAT_BITS else str(bits) for bits in pair]
    return "float" if pair == FLOAT else "/".join(texts)


def _next_step(wider: Pair | None) -> str:
    offer_others = "offer these only in the search (candidates=, --candidates)"
    if wider is None:
        return offer_others
    by_option = "by rounding='up' (--rounding up)"
    return f"take the next wider ones, here {written(wider)}, {by_option}, or {offer_others}"
