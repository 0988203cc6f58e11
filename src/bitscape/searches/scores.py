"""ScoreTable: what each candidate pair of bits would cost each layer in accuracy, as plain data.

A score file is JSON with one layer a line; `null` stands for a forbidden pair (an infinite score):

    {
      "format": 1,
      "method": "fisher",
      "repairs": 3,
      "fingerprint": "52ef8e3cb6e2a7d1",
      "candidates": ["2/2", "4/4", "8/8"],
      "scores": {
        "layer1.0.conv1": [0.31, 0.02, 0.0],
        "layer1.0.conv2": [null, 0.04, 0.0]
      }
    }
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitscape.errors import BitscapeError, first_repeated, nearest, prefixed
from bitscape.files import parse_json, read_limited, write_atomic
from bitscape.policy import LayerBits
from bitscape.tables import Shown, Table, shortened, shortened_row
from bitscape.words import counted

FORMAT = 1
_ENTRIES = ("format", "method", "repairs", "fingerprint", "candidates", "scores")
_KINDS = {int: "a whole number", str: "a text", list: "a list", dict: "an object"}
Entry = TypeVar("Entry", int, str, list[Any], dict[str, Any])


@dataclass(frozen=True, eq=False, repr=False)
class ScoreTable(Shown):
    """Scores of L layers and R candidate pairs; any budget is one `allocate` away.

    `values` is copied and made read-only. Raises BitscapeError, naming the layer, for NaN, minus infinity, a wrong
    shape, a name or pair that stands twice, and a layer whose every pair is forbidden.
    """

    layers: tuple[str, ...]
    """Layer names, one per row."""
    candidates: tuple[LayerBits, ...]
    """Pairs of bit-widths, one per column."""
    values: NDArray[np.float64]
    """Scores, shape (L, R); lower is better, infinity forbids the pair."""
    method: str
    """Name of the method that scored."""
    repairs: int = 0
    """Scores that were changed to make each row monotone in bits; many mean too few images."""
    fingerprint: str | None = None
    """`bitscape.policy.fingerprint` of the network that was scored; None fits every network that has these layers."""

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        values.setflags(write=False)
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "candidates", tuple(self.candidates))
        object.__setattr__(self, "values", values)
        check_candidates(self.candidates)
        if (twice := first_repeated(self.layers)) is not None:
            raise BitscapeError(f"layers: {twice!r} stands twice; give each layer one row")
        expected = (len(self.layers), len(self.candidates))
        if values.shape != expected:
            raise BitscapeError(f"values: shape {values.shape}; it must be (layers, candidates) = {expected}")
        for name, row in zip(self.layers, values, strict=True):
            self._check_row(name, row)

    def _check_row(self, name: str, row: NDArray[np.float64]) -> None:
        for pair, value in zip(self.candidates, row, strict=True):
            if math.isnan(value) or value == -math.inf:
                raise BitscapeError(
                    f"values: layer {name!r} has score {value} at {pair} bits; allowed are finite numbers, and "
                    "infinity for a forbidden pair; look for NaN in the layer's weights or in the images, "
                    "or values whose squares are beyond float32"
                )
        if np.isinf(row).all():
            raise BitscapeError(f"values: every pair of layer {name!r} is forbidden; leave it one, or pin the layer")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the score file; a crash leaves the old file or the new one."""
        write_atomic(path, _text(self))

    def table(self) -> Table:
        """Return the scores of the first and last layers, at the first and last pairs of bits."""
        rows = [[name, *(f"{value:.3g}" for value in row)] for name, row in zip(self.layers, self.values, strict=True)]
        head, *cells = (shortened_row(row) for row in (["layer", *map(str, self.candidates)], *shortened(rows)))
        counts = f"{counted(len(self.layers), 'layer')}, {counted(len(self.candidates), 'pair')} of bits"
        return Table(title=f"ScoreTable: {self.method}, {counts}", columns=head, rows=cells)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ScoreTable":
        """Read a score file. Raises BitscapeError, naming the file, if it is damaged or holds what no table can."""
        try:
            return _from_document(parse_json(read_limited(path)))
        except ValueError as error:  # BitscapeError is one
            raise BitscapeError(f"{os.fspath(path)}: {error}") from error


def check_candidates(candidates: Sequence[LayerBits]) -> None:
    """Raise BitscapeError unless there is at least one pair and none stands twice."""
    if not candidates:
        raise BitscapeError("candidates: none given; give at least one, e.g. LayerBits(4, 4)")
    for pair in candidates:
        if not isinstance(pair, LayerBits):
            raise BitscapeError(f"candidates: {pair!r} is no LayerBits; write e.g. LayerBits(4, 4)")
        if pair.is_float:
            raise BitscapeError("candidates: float is not searched; name the layers that stay float with keep_float")
    if (twice := first_repeated(candidates)) is not None:
        raise BitscapeError(f"candidates: {twice} stands twice; give each pair once")


def _text(table: ScoreTable) -> str:
    rows = (
        f"    {json.dumps(name)}: {json.dumps([None if math.isinf(value) else value for value in row])}"
        for name, row in zip(table.layers, table.values.tolist(), strict=True)
    )
    return (
        "{\n"
        f'  "format": {FORMAT},\n'
        f'  "method": {json.dumps(table.method)},\n'
        f'  "repairs": {table.repairs},\n'
        f'  "fingerprint": {json.dumps(table.fingerprint)},\n'
        f'  "candidates": {json.dumps([str(pair) for pair in table.candidates])},\n'
        '  "scores": {\n' + ",\n".join(rows) + "\n  }\n}\n"
    )


def _from_document(document: Any) -> ScoreTable:
    if not isinstance(document, dict) or "format" not in document:
        raise BitscapeError('not a score file: it must be an object with "format"')
    if document["format"] != FORMAT:
        raise BitscapeError(f"format {document['format']!r} is unknown; this version reads format {FORMAT}")
    for name in document:
        if name not in _ENTRIES:
            raise BitscapeError(f"unknown entry {name!r}{nearest(name, _ENTRIES)}; allowed are {', '.join(_ENTRIES)}")
    repairs = _entry(document, "repairs", int)
    if repairs < 0:
        raise BitscapeError(f"repairs is {repairs}; allowed are whole numbers from 0")
    mark = None if document.get("fingerprint") is None else _entry(document, "fingerprint", str)
    candidates = tuple(_pair(text) for text in _entry(document, "candidates", list))
    rows = {name: _row(name, row, len(candidates)) for name, row in _entry(document, "scores", dict).items()}
    values = np.array(list(rows.values()), dtype=np.float64).reshape(len(rows), len(candidates))
    return ScoreTable(tuple(rows), candidates, values, _entry(document, "method", str), repairs, mark)


def _entry(document: dict[str, Any], name: str, kind: type[Entry]) -> Entry:
    found = document.get(name)
    if type(found) is not kind:
        raise BitscapeError(f"{name} is missing" if found is None else f"{name} is {found!r}; allowed is {_KINDS[kind]}")
    return found


def _row(layer: str, row: Any, length: int) -> list[float]:
    if not isinstance(row, list) or len(row) != length:
        raise BitscapeError(f"layer {layer!r} is {row!r}; it must be a list of {length} scores, one for each of the candidates")
    return [_score(layer, value) for value in row]


def _score(layer: str, value: Any) -> float:
    if value is None:
        return math.inf
    if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # an int may be too large for a float
        return float(value)
    raise BitscapeError(f"layer {layer!r} has the score {value!r}; allowed are finite numbers, and null for a forbidden pair")


def _pair(text: Any) -> LayerBits:
    with prefixed("candidates"):
        return LayerBits.parse(str(text))
