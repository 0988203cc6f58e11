"""Which layers a search decides on: pinned layers, and groups of free ones that share their bits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from bitscape.cost.layers import NetworkProfile
from bitscape.cost.policy_cost import cap
from bitscape.errors import BitscapeError, nearest, prefixed
from bitscape.policy import LayerBits

END_BITS = LayerBits.EIGHT


@dataclass(frozen=True)
class FreeLayers:
    """Which layers the search decides on."""

    groups: tuple[tuple[str, ...], ...]
    """Free layers in call order; those of one group share one pair of bits."""
    pinned: Mapping[str, LayerBits]
    """The other layers and their bits, layers tied to a pinned one included."""
    activations: Mapping[str, int] = field(default_factory=dict)
    """Free layer -> the bits of its input, where these are fixed and only those of its weights are free."""
    with_first: "FreeLayers | None" = None
    """Where the weights of the heads are free: the same with those of the first layer free, if it is pinned by default."""

    def described(self) -> dict[str, str]:
        """Layer -> what is fixed of it: "8/8", or "*/8" where its weights are free."""
        return {name: str(bits) for name, bits in self.pinned.items()} | {
            name: f"*/{bits}" for name, bits in self.activations.items()
        }


@dataclass(frozen=True)
class Pins:
    """Layers with fixed bits, on top of those that are pinned by default unless `ends` is False."""

    layers: Mapping[str, LayerBits | str] = field(default_factory=dict)
    """Name or pattern of layers -> their bits, such as "8/8" or "float"."""
    ends: bool = True
    """Whether the first layer and the heads are pinned, as far as `layers` does not say otherwise; see `free_layers`."""


def free_layers(
    network: NetworkProfile,
    kinds: Iterable[str],
    *,
    pinned: Mapping[str, LayerBits | str] | Pins | None = None,
    keep_float: Iterable[str] = (),
    tied: Sequence[Sequence[str]] = (),
    always: Mapping[str, LayerBits] | None = None,
) -> FreeLayers:
    """Sort the layers of `network` into pinned ones and groups that share one pair.

    Args:
        network: costs of the layers.
        kinds: what the budget caps. By default the first layer is pinned at 8/8. So are the heads, but where a cap is on
            weights alone and none on weights and activations together, only their activations are kept at 8.
        pinned: None pins by default, a mapping stands for itself alone. Of several patterns that match a layer the first
            counts, an exact name before any pattern.
        keep_float: names or patterns of layers that stay float.
        tied: groups of layers that get the same bits. Layers that share one weight parameter are tied anyway.
        always: layers that are pinned as far as nothing else is said of them.

    Raises:
        BitscapeError: names and patterns of no layer, or of layers that are never called; tied layers pinned to
            different bits; a layer that is pinned and kept float.
    """
    if pinned is not None and not isinstance(pinned, Pins | Mapping):
        raise BitscapeError(f'pinned: {pinned!r} is no mapping; write e.g. {{"conv1": "8/8", "head*": "8/8"}}')
    pins = pinned if isinstance(pinned, Pins) else Pins() if pinned is None else Pins(pinned, ends=False)
    asked = _resolved("pinned", {name: _bits(name, bits) for name, bits in pins.layers.items()}, network)
    floats = _resolved("keep_float", dict.fromkeys(keep_float, LayerBits.FLOAT), network)
    if both := [name for name in floats if name in asked and not asked[name].is_float]:
        raise BitscapeError(f"keep_float: layer {both[0]!r} is pinned at {asked[both[0]]}; leave one of the two out")
    ends, activations = _default_pins(network, kinds) if pins.ends else ({}, {})
    groups, fixed = _merged(network, tied), {**(always or {}), **asked, **floats}
    freedom = _sorted(groups, {**(always or {}), **ends, **asked, **floats}, activations)
    if not activations or not ends.keys() - fixed.keys():
        return freedom
    of_inputs = {**{name: bits.activation for name, bits in ends.items()}, **activations}
    return replace(freedom, with_first=_sorted(groups, fixed, of_inputs))


def _sorted(groups: Sequence[tuple[str, ...]], fixed: Mapping[str, LayerBits], activations: Mapping[str, int]) -> FreeLayers:
    spread = {name: bits for group in groups for name, bits in _pins_of_group(group, fixed).items()}
    free = tuple(group for group in groups if group[0] not in spread)
    of_group = {group: [activations[name] for name in group if name in activations] for group in free}
    return FreeLayers(free, spread, {name: bits[0] for group, bits in of_group.items() if bits for name in group})


def _default_pins(network: NetworkProfile, kinds: Iterable[str]) -> tuple[dict[str, LayerBits], dict[str, int]]:
    """Pinned layers, and layers of which only the activations are fixed."""
    first, *heads = network.ends
    widths = [set(cap(kind).widths(network)) for kind in kinds]
    if {"weight"} in widths and not any(len(both) == 2 for both in widths):
        return {first: END_BITS}, dict.fromkeys(heads, END_BITS.activation)
    return dict.fromkeys([first, *heads], END_BITS), {}


def _bits(name: str, bits: LayerBits | str) -> LayerBits:
    if isinstance(bits, str):
        with prefixed(f"pinned: {name!r}"):
            return LayerBits.parse(bits)
    if not isinstance(bits, LayerBits):
        raise BitscapeError(f"pinned: layer {name!r} has {bits!r}; write e.g. LayerBits(8, 8)")
    return bits


def _resolved(argument: str, bits: Mapping[str, LayerBits], network: NetworkProfile) -> dict[str, LayerBits]:
    """Layer -> bits, of names and patterns."""
    exact = {name: value for name, value in bits.items() if name in network.by_name}
    by_pattern: dict[str, LayerBits] = {}
    for pattern, value in bits.items():
        if pattern in exact:
            continue
        matched = [name for name in network.by_name if fnmatchcase(name, str(pattern))]
        if not matched:
            _check_name(argument, pattern, network)
        by_pattern = {**dict.fromkeys(matched, value), **by_pattern}
    return {**by_pattern, **exact}


def _check_name(argument: str, name: str, network: NetworkProfile) -> None:
    """Raise BitscapeError for what names no layer that runs."""
    if any(character in str(name) for character in "*?[") and name not in network.by_name:
        words = str(name).strip("*?.")
        raise BitscapeError(f"{argument}: no layer that runs matches {name!r}{nearest(words, network.by_name)}")
    if name in network.uncalled:
        raise BitscapeError(f"{argument}: the network never calls layer {name!r}: its bits have no effect; leave it out")
    if name not in network.by_name:
        raise BitscapeError(f"{argument}: the network has no layer {name!r}{nearest(str(name), network.by_name)}")


def _merged(network: NetworkProfile, tied: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Join ties that overlap; every layer is in one group, groups and their layers are in call order."""
    group_of = {name: {name} for name in network.by_name}
    for tie in [*tied, *network.tied]:
        if isinstance(tie, str) or len(tie) < 2:
            raise BitscapeError(f"tied: {tie!r} is no group of layers; write e.g. [('layer1.conv1', 'layer2.conv1')]")
        for name in tie:
            _check_name("tied", name, network)
        together = set().union(*(group_of[name] for name in tie))
        group_of.update(dict.fromkeys(together, together))
    ordered = (tuple(name for name in group_of if name in group) for group in group_of.values())
    return list(dict.fromkeys(ordered))


def _pins_of_group(group: tuple[str, ...], pinned: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
    bits_of = {name: pinned[name] for name in group if name in pinned}
    if len(set(bits_of.values())) > 1:
        listed = ", ".join(f"{name} at {bits}" for name, bits in bits_of.items())
        raise BitscapeError(
            f"pinned: layers that are tied, or share one weight, are pinned to different bits ({listed}); pin them to the same"
        )
    return dict.fromkeys(group, next(iter(bits_of.values()))) if bits_of else {}
