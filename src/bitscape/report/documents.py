"""Files of measurements that a report reads: metrics, corruptions, times of exported files."""

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

from pydantic import ConfigDict, with_config

from bitscape.data.corruptions import CLEAN
from bitscape.engine.quality_table import Cell, QualityTable
from bitscape.errors import BitscapeError
from bitscape.files import json_text, write_atomic
from bitscape.schema import read_document
from bitscape.version import __version__

FORMAT: Final = 1


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class QualityDocument:
    """What `bitscape evaluate --corruptions` writes beside its heat map."""

    format: Literal[1]
    """Of this file."""
    tool: str = ""
    """What wrote it; not read."""
    cells: tuple[Cell, ...]
    """The clean one first."""


@with_config(ConfigDict(extra="ignore", strict=True))
@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One exported file in one runtime at one batch size."""

    file: str
    """Path, or what a row that is no file is called: float, onnxruntime's int8."""
    runtime: str
    """With its version."""
    batch_size: int
    """Images at once."""
    file_bytes: int
    """Size of the file."""
    float_layers: int
    """Layers that the runtime computes in float."""
    cpu_ms: float
    """CPU time of a batch."""
    wall_ms: float
    """Wall-clock time of a batch."""
    images_per_s: float
    """By the wall clock."""
    times_faster: float | None
    """Than the first row's file in the same runtime at this batch size; None where not timed."""
    top1: float | None = None
    """Percent, if images were classified."""
    agreement: float | None = None
    """Percent of the images with the class of the first row."""
    difference: float | None = None
    """Percent, of the outputs from those of the first row: norm of the difference over theirs."""
    images: int | None = None
    """Images that were run for these three."""


@with_config(ConfigDict(extra="ignore", strict=True))
@dataclass(frozen=True, kw_only=True)
class BenchDocument:
    """What `bitscape bench --json` writes."""

    format: Literal[1]
    """Of this file."""
    machine: str
    """Processor."""
    threads: int
    """Of the runtimes."""
    rounds: int
    """Visits of each file; the median counts."""
    input_shape: tuple[int, ...]
    """Of one image."""
    rows: tuple[BenchRow, ...]
    """Batch size by batch size; of each, the first row is what the others are compared with."""


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class EvaluationDocument:
    """What `bitscape evaluate --json` writes."""

    format: Literal[1]
    """Of this file."""
    tool: str = ""
    """What wrote it; not read."""
    evaluated: str
    """"float", or the file or folder that holds the bits."""
    model: str
    """Name of the network."""
    data: str
    """What --data said."""
    metric: str
    """What `value` is, such as "top-1 %"."""
    value: float
    """Of all samples."""
    others: dict[str, float]
    """Further figures by name, such as "loss"."""
    samples: int
    """That were measured."""
    cost: dict[str, float]
    """Kind of cost -> what one image costs; of a float network "parameter_bytes" and "macs"."""
    fingerprint: str | None = None
    """Of the network, where the policy has one."""
    interval: tuple[float, float] | None = None
    """95 % interval of `value`; None where none was worked out."""
    method: str | None = None
    """That found the bits, as `policies.method_of` names it; None in float."""
    bits: dict[str, str] = field(default_factory=dict)
    """Layer -> its bits, such as "4/8"; {} in float, and where images decide."""


def save_evaluation(document: EvaluationDocument, path: str | os.PathLike[str]) -> None:
    """Write measurements as JSON; a crash leaves the old file or the new one."""
    write_atomic(path, json_text(asdict(document)))


def load_evaluation(path: str | os.PathLike[str]) -> EvaluationDocument:
    """Read measurements. Raises BitscapeError, naming the file, for a damaged one."""
    return read_document(EvaluationDocument, path, format=FORMAT)


def save_quality(table: QualityTable, path: str | os.PathLike[str]) -> None:
    """Write the cells of a table as JSON; a crash leaves the old file or the new one."""
    cells = [asdict(cell) for cell in table.cells]
    write_atomic(
        path, json_text({"format": FORMAT, "tool": f"bitscape {__version__}", "cells": cells})
    )


def load_quality(path: str | os.PathLike[str]) -> QualityTable:
    """Read a table.

    Raises BitscapeError, naming the file, for a damaged one and for cells that make no table.
    """
    cells = read_document(QualityDocument, path, format=FORMAT).cells
    pairs = Counter((cell.corruption, cell.severity) for cell in cells)
    clean = [cell for cell in cells if cell.corruption == CLEAN]
    if len(clean) != 1 or len(cells) < 2 or max(pairs.values()) > 1:
        raise BitscapeError(
            f"{os.fspath(path)}: a table has one cell of clean images, "
            "and of each corruption one for each severity"
        )
    return QualityTable(cells)


def load_bench(path: str | os.PathLike[str]) -> BenchDocument:
    """Read the figures of a bench. Raises BitscapeError, naming the file, for a damaged one."""
    document = read_document(BenchDocument, path, format=FORMAT)
    if not document.rows:
        raise BitscapeError(f"{os.fspath(path)}: it has no rows; run bitscape bench again")
    return document
