"""Measured latency: what each layer takes on one machine at each pair of bits, and the time that this predicts for a policy.

A table is measured on the target machine (`bitscape latency build`) and kept as JSON, with one layer a line:

    {
      "format": 1,
      "tool": "bitscape 0.1.0",
      "runtime": "openvino 2026.4.1",
      "machine": "Intel Xeon Platinum 8481C",
      "threads": 1,
      "batch_size": 1,
      "input_shape": [3, 224, 224],
      "fingerprint": "52ef8e3cb6e2a7d1",
      "network_ms": 2.8,
      "float_ms": 26.6,
      "layers": {
        "conv1": {"8/8": 0.31, "4/8": 0.31},
        "layer1.0.conv1": {"8/8": 0.12, "4/8": 0.12}
      }
    }

Layers measured alone do not add up to the network: alone, a layer finds its weights in the cache, and elementwise work between
layers is left out. So a layer is predicted to take

    its own time * network_ms / sum over the layers of their times at 8/8

and the network at 8 bits everywhere takes what was measured, but for rounding to a nanosecond a layer.

A table of a compiler has no "float_ms", and two entries more, bytes in the same form as "layers": "flash", what a layer's weights take
as the compiler encodes them, and "sram", the working memory in use while the layer runs. A "coarseness" other than 1 is that of the
weights' scales that were compiled, see `Lsq`.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from bitscape.errors import BitscapeError, nearest
from bitscape.files import json_text, parse_json, read_limited, write_atomic
from bitscape.policy import LayerBits, fingerprint
from bitscape.version import __version__

if TYPE_CHECKING:  # it would bring torch, and a table is plain data
    from bitscape.cost.layers import NetworkProfile

FORMAT = 1
EIGHT = "8/8"
FLAT = 0.97
"""From this share of the 8-bit time on, `LatencyTable.note` calls a table flat: measured times scatter by a percent or two."""
ERRORS = 2
"""Standard errors within which a saving may be noise."""
NAMED = 3
"""Layers that `LatencyTable.note` names at most."""
MOST_MS = 1e9  # twelve days; more is a mistake, and would not fit a float once scaled


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Milliseconds of one batch of one network on one machine.

    The mappings are copied. Raises BitscapeError, naming the entry, for anything that a table file could not hold.
    """

    runtime: str
    """What ran the network, with its version: "openvino 2026.4.1"."""
    machine: str
    """Name of the processor."""
    threads: int
    """Threads that the runtime used."""
    batch_size: int
    """Images in the batch."""
    input_shape: tuple[int, ...]
    """Shape of one image, without batch."""
    fingerprint: str
    """`bitscape.policy.fingerprint` of the network, attention split."""
    network_ms: float
    """The whole network with every layer at 8/8."""
    float_ms: float | None = None
    """The whole network in float, in the same runtime; None of a compiler of integers."""
    layers: Mapping[str, Mapping[str, float]]
    """Layer name -> weight/activation bits, "4/8" -> time of the layer measured alone, all its calls together; 8/8 is needed."""
    flash: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The same layers and bits -> bytes of flash; empty unless a compiler tells them."""
    sram: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The same layers and bits -> bytes of working memory; empty unless a compiler tells them."""
    coarseness: float = 1.0
    """Of the weights' scales that a compiler encoded, as in `Lsq`; a policy found by the table is for `Lsq` of the same."""

    def __post_init__(self) -> None:
        for name in ("runtime", "machine", "fingerprint"):
            _check(name, getattr(self, name), "a text", lambda value: isinstance(value, str) and value)
        for name in ("threads", "batch_size"):
            _check(name, getattr(self, name), "whole numbers from 1", _is_count)
        _check("input_shape", self.input_shape, "whole numbers from 1, such as [3, 224, 224]", _is_shape)
        _check("layers", self.layers, "an object with at least one layer", lambda value: isinstance(value, Mapping) and value)
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        for name in ("network_ms", *(["float_ms"] if self.float_ms is not None else [])):
            object.__setattr__(self, name, _milliseconds(name, getattr(self, name)))
        object.__setattr__(self, "layers", {name: _layer_times(name, times) for name, times in self.layers.items()})
        _check("coarseness", self.coarseness, "numbers above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf)
        for name in ("flash", "sram"):
            object.__setattr__(self, name, _all_bytes(name, getattr(self, name), self.layers))

    @property
    def where(self) -> str:
        """What was measured where, for people."""
        return f"{self.runtime}, {self.machine}, threads: {self.threads}, batch: {self.batch_size}"

    def source(self) -> dict[str, Any]:
        """What was measured where, for the provenance of a policy."""
        return {name: getattr(self, name) for name in ("runtime", "machine", "threads", "batch_size", "coarseness")}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table file; a crash leaves the old file or the new one."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        entries = {name: value for name in _ENTRIES if (value := getattr(self, name)) not in (defaults[name], {})}
        write_atomic(path, json_text({"format": FORMAT, "tool": f"bitscape {__version__}", **entries}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyTable":
        """Read a table file. Raises BitscapeError, naming the file, if it is damaged or holds what no table can."""
        try:
            return _from_document(parse_json(read_limited(path)))
        except ValueError as error:  # BitscapeError is one
            raise BitscapeError(f"{os.fspath(path)}: {error}") from error

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise BitscapeError unless the network whose layers have these weight shapes is the one that was measured."""
        for name in self.layers:
            if name not in shapes:
                raise BitscapeError(f"latency table: the network has no layer {name!r}{nearest(name, shapes)}; {_MEASURE}")
        if self.fingerprint != (found := fingerprint(shapes)):
            raise BitscapeError(
                f"latency table: it is of a network with fingerprint {self.fingerprint}, and this one has {found}: "
                f"layer names or weight shapes differ; {_MEASURE}"
            )

    def spread(self) -> float:
        """Return the time with every layer at the fastest pair of bits, as a share of that at 8/8; both are sums over the layers.

        One pair for all layers: the fastest of each layer would add up what noise takes off each.
        """
        return self._fastest().share

    def note(self) -> str | None:
        """Say so if fewer bits save less than 3 % of the time, which a cap cannot make use of, or no more than noise may; else None.

        Times that differ from layer to layer look alike whether few layers gain or the measurement is noisy: the note tells both.
        """
        fastest = self._fastest()
        if fastest.share + fastest.margin < FLAT:
            return None
        found = f"with every layer at {fastest.pair}, the fastest, the network takes {100 * fastest.share:.1f} % of its time at 8/8"
        if fastest.share >= FLAT:
            return (
                f"latency table ({self.where}) is flat below 8 bits: {found}, so a cap in ms cannot be met by fewer bits; "
                "a bytes cap is what fewer bits buy here, e.g. weight_bytes=0.5x"
            )
        return (
            f"latency table ({self.where}) leaves open whether fewer bits are faster: {found}, give or take "
            f"{100 * fastest.margin:.1f} points by how its layers differ; the {100 * (1 - fastest.share):.1f} % saved are from some layers "
            f"(most: {', '.join(self._gaining(fastest.pair))}), or noise; measure again with more --rounds and nothing else running to "
            "tell, and cap bytes until then, e.g. weight_bytes=0.5x"
        )

    def _fastest(self) -> "_Uniform":
        pairs = dict.fromkeys(pair for times in self.layers.values() for pair in times if pair != EIGHT)
        uniform = [self._uniform(pair) for pair in pairs]
        return min(uniform, key=lambda each: each.share + each.margin, default=_Uniform(pair=EIGHT, share=1.0, margin=0.0))

    def _gaining(self, pair: str) -> list[str]:
        """The layers that gain most at `pair`: as many as make up half of what the network gains, at most `NAMED`."""
        gains = {name: times[EIGHT] - times.get(pair, times[EIGHT]) for name, times in self.layers.items()}
        half, named = math.fsum(gains.values()) / 2, list[str]()
        for name in sorted(gains, key=lambda name: -gains[name])[:NAMED]:
            if math.fsum(gains[before] for before in named) < half:
                named.append(name)
        return named

    def _uniform(self, pair: str) -> "_Uniform":
        """All layers at `pair`; those that were not measured there, such as layers that a target keeps at 8 bits, at 8/8."""
        total = math.fsum(times[EIGHT] for times in self.layers.values())
        # Layers that agree in every time are of one form, and were measured once: their errors do not average out.
        forms = Counter(tuple(times.items()) for times in self.layers.values() if pair in times)
        both = [(count * dict(form)[pair], count * dict(form)[EIGHT]) for form, count in forms.items()]
        own, eight = map(math.fsum, zip(*both, strict=True))
        squares = math.fsum((a - own / eight * b) ** 2 for a, b in both)
        error = math.sqrt(squares * len(both) / max(1, len(both) - 1)) / total  # of a ratio of sums
        noise = 0.0 if self.flash else ERRORS * error  # a compiler's times have none
        return _Uniform(pair=pair, share=(total - eight + own) / total, margin=noise)


@dataclass(frozen=True, kw_only=True)
class _Uniform:
    """A network with every layer at one pair of bits."""

    pair: str
    share: float
    """Its time, as a share of that at 8/8."""
    margin: float
    """What noise may make of the share, by how much the own shares of the layers that were measured at the pair differ."""


_ENTRIES = tuple(entry.name for entry in fields(LatencyTable))
_OPTIONAL = ("float_ms", "flash", "sram", "coarseness")
_MEASURE = "measure this network: bitscape latency build"
_WIDTHS = tuple("12345678")


def with_latency(network: "NetworkProfile", table: LatencyTable) -> "NetworkProfile":
    """Join a table to the network it was measured on: its layers get `latency_ns`, and the cost `latency_ms` is known.

    Times are scaled such that the network at 8 bits takes `table.network_ms`. Raises BitscapeError if names, weight shapes or
    the input shape differ.
    """
    table.check(network.shapes)
    if network.input_shape != table.input_shape:
        own, measured = ("x".join(map(str, shape)) for shape in (network.input_shape, table.input_shape))
        raise BitscapeError(
            f"latency table: it is of images of {measured}, and these have {own}; measure at this size: bitscape latency build"
        )
    for layer in network.layers:
        if layer.name not in table.layers:
            raise BitscapeError(f"latency table: layer {layer.name!r} was not measured; {_MEASURE}")
    scale = 1e6 * table.network_ms / math.fsum(table.layers[layer.name][EIGHT] for layer in network.layers)
    times = {name: {_pair(name, text): round(ms * scale) for text, ms in row.items()} for name, row in table.layers.items()}
    flash, sram = (_by_pair(part) for part in (table.flash, table.sram))
    layers = (
        replace(layer, latency_ns=times[layer.name], flash_bytes=flash.get(layer.name, {}), sram_bytes=sram.get(layer.name, {}))
        for layer in network.layers
    )
    return replace(network, layers=tuple(layers))


def _by_pair(part: Mapping[str, Mapping[str, int]]) -> dict[str, dict[LayerBits, int]]:
    return {name: {_pair(name, text): count for text, count in row.items()} for name, row in part.items()}


def _check(name: str, value: Any, allowed: str, holds: Callable[[Any], object]) -> None:
    if not holds(value):
        raise BitscapeError(f"{name!r} is {value!r}; allowed are {allowed}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_amount(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_count, value))


def _milliseconds(name: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_MS:
        return float(value)
    raise BitscapeError(f"{name} is {value!r}; allowed are milliseconds above 0, at most {MOST_MS:g}")


def _layer_times(layer: str, times: Any) -> dict[str, float]:
    if not isinstance(times, Mapping) or EIGHT not in times:
        raise BitscapeError(f'layer {layer!r} is {times!r}; it must read like {{"8/8": 0.31, "4/8": 0.3}}, with 8/8 in it')
    return {str(_pair(layer, text)): _milliseconds(f"layer {layer!r} at {text} bits", ms) for text, ms in times.items()}


def _all_bytes(entry: str, found: Any, layers: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    """Bytes of every layer at every pair of bits, or of none."""
    if not isinstance(found, Mapping) or (found and {name: set(row) for name, row in layers.items()} != _keys(found)):
        raise BitscapeError(f"{entry!r} must hold the layers of the table at the same bits, or be left out")
    for name, row in found.items():
        for pair, count in row.items():
            _check(f"{entry} of layer {name!r} at {pair} bits", count, "whole numbers from 0", _is_amount)
    return {name: dict(row) for name, row in found.items()}


def _keys(found: Mapping[Any, Any]) -> dict[Any, set[Any]]:
    return {name: set(row) if isinstance(row, Mapping) else set() for name, row in found.items()}


def _pair(layer: str, text: str) -> LayerBits:
    weight, _, activation = str(text).partition("/")
    if weight in _WIDTHS and activation in _WIDTHS:
        return LayerBits(int(weight), int(activation))
    raise BitscapeError(f"layer {layer!r}: {text!r} is no pair of bits; write weight/activation bits from 1 to 8, e.g. 4/8")


def _from_document(document: Any) -> LatencyTable:
    if not isinstance(document, dict) or "format" not in document or "layers" not in document:
        raise BitscapeError('not a latency table: it must be an object with "format" and "layers"')
    if document["format"] != FORMAT:
        raise BitscapeError(f"format {document['format']!r} is unknown; this version reads format {FORMAT}")
    entries = {name: value for name, value in document.items() if name not in ("format", "tool")}
    for name in entries:
        if name not in _ENTRIES:
            raise BitscapeError(f"unknown entry {name!r}{nearest(name, _ENTRIES)}; allowed are {', '.join(_ENTRIES)}")
    for name in _ENTRIES:
        if name not in entries and name not in _OPTIONAL:
            raise BitscapeError(f"entry {name!r} is missing; a table holds {', '.join(_ENTRIES)}")
    return LatencyTable(**entries)
