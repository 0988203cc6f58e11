"""Measured policies, kept in a folder, so that the same call goes on where a killed one stopped."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitscape.engine.checkpoint import changes
from bitscape.errors import BitscapeError
from bitscape.policy import Policy
from bitscape.searches.scores import ScoreTable

EVALUATIONS_FILE, SCORES_FILE = "evaluations.jsonl", "evaluations.scores.json"
SIZE = "weight_bytes"
"""The cost that tells readers of the file which policy it was."""


@dataclass(kw_only=True)
class Evaluations:
    """What was measured so far, also in a file of JSON lines; a line that a crash cut off is done again."""

    what: str
    """Is measured, for messages, such as "budget drop: the metric"."""
    path: Path | None
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path | None, asked: Mapping[str, Any], what: str) -> "Evaluations":
        """Go on from the folder's file, or begin one. Raises BitscapeError if it is of another search."""
        if folder is None:
            return cls(what=what, path=None)
        folder.mkdir(parents=True, exist_ok=True)
        log = cls(what=what, path=folder / EVALUATIONS_FILE)
        asked = json.loads(json.dumps(asked))
        lines = _lines(folder / EVALUATIONS_FILE)
        if not lines:
            log._write({"search": asked})
        elif changed := changes(lines[0].get("search", {}), asked):
            raise BitscapeError(f"folder {folder} is of another search: {changed}; give another folder, or delete this one")
        log.records = lines[1:]
        return log

    def scores(self, score: Callable[[], ScoreTable]) -> ScoreTable:
        """Return the scores of the file beside if this search wrote them, or the ones that `score` makes."""
        path = None if self.path is None else self.path.with_name(SCORES_FILE)
        if path is not None and path.is_file() and {"scores": _sha256(path)} in self.records:
            return ScoreTable.load(path)
        scores = score()
        if path is not None:
            scores.save(path)
            self._add({"scores": _sha256(path)})
        return scores

    def float_value(self, measure: Callable[[], float]) -> float:
        """Return the metric of the float network."""
        return self._value("float", {}, measure, "the float network")

    def value(self, policy: Policy, measure: Callable[[], float]) -> float:
        """Return the metric of a policy's network."""
        bits = {name: str(bits) for name, bits in policy.layers.items()}
        key = hashlib.sha256(json.dumps(bits, sort_keys=True).encode()).hexdigest()[:16]
        size = policy.cost[SIZE]
        return self._value(key, {SIZE: size}, measure, f"the network quantized to {size:,.0f} weight bytes")

    def _value(self, key: str, about: Mapping[str, Any], measure: Callable[[], float], network: str) -> float:
        known = next((record["value"] for record in self.records if record.get("policy") == key), None)
        if known is not None:
            return float(known)
        started = time.perf_counter()
        value = float(measure())
        if not math.isfinite(value):
            raise BitscapeError(f"{self.what} of {network} is {value}; it must be finite: check metric and targets")
        record = {"policy": key, **about, "value": value, "seconds": round(time.perf_counter() - started, 3)}
        self._add(record)
        return value

    def _add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line without an end is taken out of it."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        whole, _, cut = text.rpartition("\n")
        if cut:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise BitscapeError(f"{path}: it is damaged ({error}); give another folder, or delete this one") from error
