"""Policy: the bits of each layer, as plain data that reads and edits well as a file.

A policy file is JSON, keyed by layer name, with one layer a line:

    {
      "format": 1,
      "tool": "bitscape 0.1.0",
      "fingerprint": "52ef8e3cb6e2a7d1",
      "cost": {
        "bitops": 388000000
      },
      "provenance": {
        "method": "fisher"
      },
      "layers": {
        "conv1": {"weight": 8, "activation": 8},
        "layer1.0.conv1": {"weight": 3, "activation": 4}
      }
    }

Only "format" and "layers" are needed in a file written by hand.
"""

import contextlib
import hashlib
import json
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from bitscape.errors import BitscapeError, nearest
from bitscape.files import json_text, parse_json, read_limited, write_atomic
from bitscape.plots import new_axes, steps
from bitscape.signatures import checked
from bitscape.tables import Shown, Table, shortened
from bitscape.version import __version__
from bitscape.words import cost_text, counted

FORMAT = 1
MAX_BITS = 8
"""Of what a search offers unless it is told otherwise, and of weights."""
WEIGHT_BITS = (*range(1, MAX_BITS + 1),)
WIDE_BITS = 16
"""Of activations alone."""
ACTIVATION_BITS = (*WEIGHT_BITS, WIDE_BITS)
FLOAT_BITS = 32
"""Of weights and activations that stay float."""
SHOWN_NAMES = 5  # an error names this many layers and counts the others


class PolicyError(BitscapeError):
    """A policy that is invalid, cannot be read, or does not fit the network."""


@dataclass(frozen=True, order=True)
class LayerBits:
    """Bit-widths of one layer: weights from 1 to 8, activations from 1 to 8 or 16; or 32 for both, a layer that stays float."""

    weight: int
    """Bits of the layer's weights."""
    activation: int
    """Bits of the layer's input."""

    EIGHT: ClassVar["LayerBits"]
    """Weights and activations of 8 bits."""
    FLOAT: ClassVar["LayerBits"]
    """A layer left as it is."""

    def __post_init__(self) -> None:
        if self.is_float:
            return
        for name, bits, allowed in (("weight", self.weight, WEIGHT_BITS), ("activation", self.activation, ACTIVATION_BITS)):
            if type(bits) is not int or bits not in allowed:
                more = " and 16" if allowed is ACTIVATION_BITS else ""
                raise PolicyError(
                    f"{name} bits are {bits!r}; allowed are whole numbers from 1 to {MAX_BITS}{more}, "
                    "or 32 for weights and activations of a layer that stays float"
                )

    @classmethod
    @checked
    def parse(cls, text: str) -> "LayerBits":
        """Read "4/8" (weight / activation bits) or "float". Raises PolicyError for any other text."""
        if text == "float":
            return cls.FLOAT
        if not (pair := _PAIR.fullmatch(text)):
            raise PolicyError(f"bits {text!r}: write weight/activation bits, e.g. 4/8, or float")
        return cls(int(pair.group(1)), int(pair.group(2)))

    @property
    def is_float(self) -> bool:
        """Whether the layer is left as it is."""
        return type(self.weight) is type(self.activation) is int and self.weight == self.activation == FLOAT_BITS

    def __str__(self) -> str:
        return "float" if self.is_float else f"{self.weight}/{self.activation}"


LayerBits.EIGHT = LayerBits(8, 8)
LayerBits.FLOAT = LayerBits(FLOAT_BITS, FLOAT_BITS)
_PAIR = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True, repr=False)
class Policy(Shown):
    """Bits for every quantizable layer of one network.

    The mappings are copied; `provenance` is reduced to what JSON holds (tuples become lists).
    Raises PolicyError for anything that a policy file could not hold.
    """

    layers: Mapping[str, LayerBits]
    """Layer name -> bits."""
    fingerprint: str | None = None
    """`fingerprint` of the network it was made for; None fits every network that has these layers."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """What it costs: name of the cost -> value."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was found: method, settings, seed, budget, proxy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "cost", {name: _number(name, value) for name, value in self.cost.items()})
        object.__setattr__(self, "provenance", _plain(self.provenance))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy file; a crash leaves the old file or the new one."""
        write_atomic(path, _text(self))

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> "Policy":
        """Read a policy file. Raises PolicyError, naming the file, if it is damaged or holds what no policy can."""
        try:
            return cls.from_document(parse_json(read_limited(path)))
        except ValueError as error:  # PolicyError is one
            raise PolicyError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def from_document(cls, document: Any) -> "Policy":
        """Build the policy of what a policy file holds, read as JSON. Raises PolicyError, naming the entry."""
        return _from_document(document)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise PolicyError unless the policy covers the network whose layers have these weight shapes."""
        unknown = [name for name in self.layers if name not in shapes]
        if unknown:
            hint = nearest(unknown[0], shapes)
            raise PolicyError(f"the network has no layer {_listed(unknown)}{hint}; rename or remove it in the policy")
        missing = [name for name in shapes if name not in self.layers]
        if missing:
            raise PolicyError(f"the policy gives no bits for {_listed(missing)}; every layer needs an entry")
        found = fingerprint(shapes)
        if self.fingerprint not in (None, found):
            raise PolicyError(
                f"the policy was made for a network with fingerprint {self.fingerprint}, this one has {found}: "
                "the layer names agree, the weight shapes do not; search again for this network, or set the policy's "
                "fingerprint to null to use it all the same"
            )

    def table(self) -> Table:
        """Return the bits of the first and last layers, and the costs."""
        rows = [(name, str(bits.weight), str(bits.activation)) for name, bits in self.layers.items()]
        method = self.provenance.get("method")
        return Table(
            title=f"Policy: {counted(len(rows), 'layer')}{'' if method is None else f', {method}'}",
            columns=("layer", "weight bits", "activation bits"),
            rows=shortened(rows),
            note=", ".join(f"{kind} {cost_text(kind, value)}" for kind, value in self.cost.items()),
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw the bits of weights and activations, layer after layer.

        Args:
            axes: of matplotlib, to draw on; None makes a figure.

        Returns:
            The axes.

        Raises:
            BitscapeError: matplotlib is not installed.
        """
        axes = new_axes(axes)
        bits = self.layers.values()
        lines = {"weights": [b.weight for b in bits], "activations": [b.activation for b in bits]}
        steps(axes, list(self.layers), lines)
        widest = max((MAX_BITS, *lines["weights"], *lines["activations"]))
        axes.set(ylabel="bits", ylim=(0, widest + 0.5), title=self.table().title)
        return axes

    def difference(self, other: "Policy") -> list[tuple[str, LayerBits | None, LayerBits | None]]:
        """List (layer, bits here, bits in `other`) where the two differ; None where a policy lacks the layer."""
        names = dict.fromkeys([*self.layers, *other.layers])
        pairs = ((name, self.layers.get(name), other.layers.get(name)) for name in names)
        return [(name, here, there) for name, here, there in pairs if here != there]


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Identify a network by its layers: 16 hex digits of a SHA-256 over the sorted "name:16x3x3x3" lines."""
    lines = sorted(f"{name}:{'x'.join(str(size) for size in shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def uniform_policy(names: Iterable[str], bits: LayerBits, pinned: Mapping[str, LayerBits] | None = None) -> Policy:
    """Give each of the layers `names` the same bits, except for those in `pinned`, which must be among them."""
    layers = dict.fromkeys(names, bits)
    for name in pinned or {}:
        if name not in layers:
            raise PolicyError(f"pinned layer {name!r} is not among the layers{nearest(name, layers)}")
    return Policy({**layers, **(pinned or {})})


def _checked_layers(layers: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
    for name, bits in layers.items():
        if not isinstance(name, str) or not isinstance(bits, LayerBits):
            raise PolicyError(f"layers must map names to LayerBits, got {name!r}: {bits!r}")
    return dict(layers)


def _number(name: str, value: Any) -> float:
    with contextlib.suppress(OverflowError):  # of a whole number that no float holds
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise PolicyError(f"cost {name!r} is {value!r}; allowed are finite numbers")


def _plain(provenance: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PolicyError(f"provenance cannot be written as JSON: {error}") from error
    return plain


def _text(policy: Policy) -> str:
    layers = {name: {"weight": bits.weight, "activation": bits.activation} for name, bits in policy.layers.items()}
    head = {"format": FORMAT, "tool": f"bitscape {__version__}", "fingerprint": policy.fingerprint}
    return json_text({**head, "cost": policy.cost, "provenance": policy.provenance, "layers": layers})


def _from_document(document: Any) -> Policy:
    if not isinstance(document, dict) or "format" not in document or "layers" not in document:
        raise PolicyError('not a policy file: it must be an object with "format" and "layers"')
    if document["format"] != FORMAT:
        raise PolicyError(f"format {document['format']!r} is unknown; this version reads format {FORMAT}")
    known = {"format", "tool", *(entry.name for entry in fields(Policy))}
    for name in document:
        if name not in known:
            raise PolicyError(f"unknown entry {name!r}{nearest(name, known)}; allowed are {', '.join(sorted(known))}")
    mark = document.get("fingerprint")
    if mark is not None and not isinstance(mark, str):
        raise PolicyError(f"fingerprint is {mark!r}; allowed are a text or null")
    layers = {name: _bits(name, entry) for name, entry in _object(document, "layers").items()}
    return Policy(layers, mark, _object(document, "cost"), _object(document, "provenance"))


def _object(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = document.get(name, {})
    if not isinstance(entry, dict):
        raise PolicyError(f"{name!r} is {entry!r}; it must be an object")
    return entry


def _bits(layer: str, entry: Any) -> LayerBits:
    if not isinstance(entry, dict) or set(entry) != {"weight", "activation"}:
        raise PolicyError(f'layer {layer!r} is {entry!r}; it must read like {{"weight": 4, "activation": 8}}')
    try:
        return LayerBits(**entry)
    except PolicyError as error:
        raise PolicyError(f"layer {layer!r}: {error}") from error


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown} and {len(names) - SHOWN_NAMES} more"
