"""Which layers a search decides on: pinned layers, and groups of free ones that share their bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitscape.cost.layers import NetworkProfile
from bitscape.errors import BitscapeError, nearest
from bitscape.policy import LayerBits


@dataclass(frozen=True)
class FreeLayers:
    """Which layers the search decides on."""

    groups: tuple[tuple[str, ...], ...]
    """Free layers in call order; those of one group share one pair of bits."""
    pinned: Mapping[str, LayerBits]
    """The other layers and their bits, layers tied to a pinned one included."""


@dataclass(frozen=True)
class Pins:
    """Layers with fixed bits, on top of those that are pinned by default unless `ends` is False."""

    layers: Mapping[str, LayerBits] = field(default_factory=dict)
    """Layer -> its bits."""
    ends: bool = True
    """Whether the first and the last layer are pinned, as far as `layers` does not say otherwise."""


def as_pins(pinned: Mapping[str, LayerBits] | Pins | None, network: NetworkProfile) -> dict[str, LayerBits]:
    """Return layer -> bits. None pins the ends by default; a mapping stands for itself alone."""
    if not isinstance(pinned, Pins):
        pinned = Pins() if pinned is None else Pins(pinned, ends=False)
    for name, bits in pinned.layers.items():
        _check_name("pinned", name, network)
        if not isinstance(bits, LayerBits):
            raise BitscapeError(f"pinned: layer {name!r} has {bits!r}; write e.g. LayerBits(8, 8)")
    ends = dict.fromkeys(network.ends, LayerBits.EIGHT) if pinned.ends else {}
    return {**ends, **pinned.layers}


def free_layers(
    network: NetworkProfile, pinned: Mapping[str, LayerBits], tied: Sequence[Sequence[str]] = ()
) -> FreeLayers:
    """Sort the layers of `network` into pinned ones and groups that share one pair.

    Layers that share one weight parameter are tied anyway. Raises BitscapeError for unknown or never-called names and
    for tied layers pinned to different bits.
    """
    groups = _merged(network, tied)
    spread = {name: bits for group in groups for name, bits in _pins_of_group(group, pinned).items()}
    return FreeLayers(tuple(group for group in groups if group[0] not in spread), spread)


def _check_name(argument: str, name: str, network: NetworkProfile) -> None:
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
