"""What a report is made of: folders of runs, and files of policies, scores and measurements, told apart by their content."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitscape.cost.latency import LatencyTable
from bitscape.dynamic.storage import (
    DynamicDocument,
    TiersDocument,
    read_dynamic,
    read_tiers,
    tier_folder,
)
from bitscape.engine.quality_table import QualityTable
from bitscape.errors import BitscapeError
from bitscape.files import parse_json, read_limited
from bitscape.folders import DYNAMIC_FILE, METRICS, POLICY_FILE, RUN, TIERS_FILE
from bitscape.measure.analysis.result import Analysis
from bitscape.policy import Policy
from bitscape.report.documents import BenchDocument, EvaluationDocument, load_bench, load_evaluation, load_quality
from bitscape.searches.scores import ScoreTable

READS = (
    "folders of `bitscape train` and `tiers`; policy and score files of `bitscape search` and `solve`; "
    "the .json of `bitscape evaluate --json` and `--corruptions`, `analyze --out`, `bench --json` and `latency build`"
)

_READERS: tuple[tuple[str, str, Callable[[Path], Any]], ...] = (
    ("network_ms", "latencies", LatencyTable.load),  # before policies: it has layers too
    ("compared", "analyses", Analysis.load),  # likewise
    ("layers", "policies", Policy.load),
    ("evaluated", "evaluations", load_evaluation),
    ("scores", "scores", ScoreTable.load),
    ("cells", "quality_tables", load_quality),
    ("rows", "benches", load_bench),
)
"""An entry that only this kind of file has -> where it goes, what reads it."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A folder that training left."""

    settings: Mapping[str, Any]
    """As in run.json; free inside."""
    versions: Mapping[str, Any] = field(default_factory=dict)
    """Package -> version."""
    device: str = ""
    """What torch calls what it ran on."""
    hardware: str = ""
    """Name of it, if it was recorded."""
    command: str | None = None
    """What started it, if it was recorded."""
    commit: str | None = None
    """Of the code, if it was recorded."""
    records: tuple[Mapping[str, float], ...]
    """One an epoch, as in metrics.jsonl."""
    policy: Policy | None
    """None for a float network, and for a run that has not ended."""
    dynamic: DynamicDocument | None = None
    """What images decide about; None for static bits."""

    @property
    def seed(self) -> int | None:
        """Of training."""
        seed = self.settings.get("seed")
        return seed if type(seed) is int else None

    @property
    def is_float(self) -> bool:
        """Whether nothing was quantized."""
        return not self.settings.get("bits")

    @property
    def ended(self) -> bool:
        """Whether every epoch that was asked for is there."""
        return bool(self.records) and self.records[-1]["epoch"] == self.settings.get("epochs")

    @property
    def bitops_cap(self) -> float | None:
        """BitOps that an image may cost, of a dynamic network."""
        step = self.settings.get("step")
        cap = step.get("bitops") if isinstance(step, Mapping) else None
        return cap if type(cap) in (int, float) else None

    @property
    def top1(self) -> float | None:
        """Top-1 in percent on the validation images after the last epoch, of the averaged weights if there are any."""
        last = self.records[-1] if self.records else {}
        return last.get("ema_validation_top1", last.get("validation_top1"))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that was read: what it is called in the report -> what it holds."""

    runs: Mapping[str, TrainedRun]
    policies: Mapping[str, Policy]
    """Of policy files, of runs, and of tiers."""
    scores: Mapping[str, ScoreTable]
    analyses: Mapping[str, Analysis]
    tiers: Mapping[str, TiersDocument]
    evaluations: Mapping[str, EvaluationDocument]
    quality_tables: Mapping[str, QualityTable]
    benches: Mapping[str, BenchDocument]
    latencies: Mapping[str, LatencyTable]
    names: tuple[str, ...]
    """Of everything, in the order given."""


def read_inputs(paths: Iterable[str | os.PathLike[str]]) -> Inputs:
    """Read files and folders of any of these kinds, in any mix.

    Raises:
        BitscapeError: a path that is not there or damaged, content of no known kind, or files of several networks; the file is named.
    """
    found = list(dict.fromkeys(Path(path) for path in paths))
    if not found:
        raise BitscapeError(f"RUN is missing; give at least one of: {READS}")
    names_of_kinds = ("runs", "policies", "scores", "analyses", "tiers", "evaluations", "quality_tables", "benches", "latencies")
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in names_of_kinds}
    names = _names(found)
    for path, name in zip(found, names, strict=True):
        for kind, label, value in _folder(path, name) if path.is_dir() else [_file(path, name)]:
            kinds[kind][label] = value
    inputs = Inputs(names=names, **kinds)
    _check_one_network(inputs)
    return inputs


def _names(paths: list[Path]) -> tuple[str, ...]:
    """The last part of each path, or the whole path where several end alike."""
    last = [path.resolve().name for path in paths]
    return tuple(name if last.count(name) == 1 else str(path) for path, name in zip(paths, last, strict=True))


def _file(path: Path, name: str) -> tuple[str, str, Any]:
    try:
        document = parse_json(read_limited(path))
    except ValueError as error:
        raise BitscapeError(f"{path}: {error}") from error
    for mark, kind, read in _READERS:
        if isinstance(document, dict) and mark in document:
            return kind, name, read(path)
    raise BitscapeError(f"{path}: none of the files that a report reads; allowed are {READS}")


def _folder(path: Path, name: str) -> list[tuple[str, str, Any]]:
    if (path / TIERS_FILE).is_file():
        tiers = read_tiers(path)
        own = [(f"{name}/tier{at + 1}", tier_folder(path, at) / POLICY_FILE) for at in range(len(tiers.tiers))]
        return [("tiers", name, tiers), *(("policies", label, Policy.load(file)) for label, file in own)]
    if not (path / RUN).is_file():
        raise BitscapeError(f"{path}: no {RUN} and no {TIERS_FILE} in this folder; allowed are {READS}")
    run = _run(path)
    return [("runs", name, run), *([] if run.policy is None else [("policies", name, run.policy)])]


def _run(folder: Path) -> TrainedRun:
    about = _parsed(folder / RUN, _content(folder / RUN))
    settings, versions = about.get("settings"), about.get("versions", {})
    if about.get("format") != 1 or not isinstance(settings, dict) or not isinstance(versions, dict):
        raise BitscapeError(f"{folder / RUN}: it has no settings, or another format; this version reads format 1")
    metrics, policy = folder / METRICS, folder / POLICY_FILE
    lines = _content(metrics).splitlines() if metrics.is_file() else []
    command, commit = (value if isinstance(value := about.get(name), str) else None for name in ("command", "commit"))
    return TrainedRun(
        settings=settings,
        versions=versions,
        device=str(about.get("device", "")),
        hardware=str(about.get("hardware", "")),
        command=command,
        commit=commit,
        records=tuple(_record(metrics, number, line) for number, line in enumerate(lines, start=1)),
        policy=Policy.load(policy) if policy.is_file() else None,
        dynamic=read_dynamic(folder) if (folder / DYNAMIC_FILE).is_file() else None,
    )


def _record(path: Path, number: int, line: bytes) -> dict[str, float]:
    record = _parsed(f"{path}, line {number}", line)
    if "epoch" not in record or not all(isinstance(value, int | float) for value in record.values()):
        raise BitscapeError(
            f"{path}, line {number}: a record holds numbers, its epoch among them; write it again: bitscape train --resume ..."
        )
    return record


def _content(path: Path) -> bytes:
    try:
        return read_limited(path)
    except ValueError as error:
        raise BitscapeError(f"{path}: {error}") from error


def _parsed(where: Path | str, content: bytes) -> dict[str, Any]:
    try:
        document = parse_json(content)
    except ValueError as error:
        raise BitscapeError(f"{where}: {error}") from error
    if not isinstance(document, dict):
        raise BitscapeError(f"{where}: it is no JSON object")
    return document


def _check_one_network(inputs: Inputs) -> None:
    """Refuse files of two networks: layer names, or fingerprints where both have one, differ."""
    parts: dict[str, ScoreTable | LatencyTable | Analysis] = {**inputs.scores, **inputs.latencies, **inputs.analyses}
    first = next(iter(inputs.policies), None)
    for name, policy in inputs.policies.items():
        if policy.layers.keys() != inputs.policies[first or name].layers.keys():
            raise _two_networks(name, first)
    for name, part in parts.items():
        if first is not None and not set(part.layers) <= inputs.policies[first].layers.keys():
            raise _two_networks(name, first)
    everything: dict[str, Policy | ScoreTable | LatencyTable | Analysis | EvaluationDocument] = {
        **inputs.policies,
        **parts,
        **inputs.evaluations,
    }
    marks = {name: part.fingerprint for name, part in everything.items() if part.fingerprint is not None}
    for name, mark in marks.items():
        if mark != next(iter(marks.values())):
            raise _two_networks(name, next(iter(marks)))


def _two_networks(name: str, other: str | None) -> BitscapeError:
    return BitscapeError(f"{name} and {other} are of two networks; a report is about one: give the files of each network to its own")
