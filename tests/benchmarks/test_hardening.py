"""The tools that damage files and judge what comes of it; the long runs are benchmarks."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch

from benchmarks.hardening_data import Reader, Wrong
from benchmarks.hardening_fuzz import _outcome
from benchmarks.hardening_mutations import (
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_structure,
    metadata_only,
)
from benchmarks.hardening_readers import READERS, resealed
from bitscape.errors import BitscapeError
from bitscape.files import UNSEALED, check_seal, sealed

DOCUMENT = json.dumps({"format": 1, "layers": {"a": {"weight": 4}, "b": {"weight": 8}}, "list": [1, 2.5, None, "text"]}).encode()
WEIGHTS = {"a": torch.randn(4, 3), "b": torch.arange(6)}
FILE = safetensors.torch.save(WEIGHTS, {"bitscape": json.dumps({"format": 1, "checksum": UNSEALED, "more": [1, 2]})})
DAMAGES = [
    (damaged_bytes, DOCUMENT),
    (damaged_json, DOCUMENT),
    (damaged_lines, b"\n".join([DOCUMENT] * 3)),
    (damaged_safetensors, FILE),
    (damaged_structure, FILE),
    (metadata_only, FILE),
]


def header_of(content: bytes) -> bytes:
    return content[8 : 8 + struct.unpack("<Q", content[:8])[0]]


@pytest.mark.parametrize(("damage", "content"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_repeats_with_its_seed_and_mostly_changes_the_file(damage: Callable[[bytes, Random], bytes], content: bytes) -> None:
    made = [damage(content, Random(seed)) for seed in range(200)]
    assert made == [damage(content, Random(seed)) for seed in range(200)]
    assert sum(each != content for each in made) > 150 and len(set(made)) > 100


def test_damaged_json_is_in_part_readable_and_in_part_not() -> None:
    def kind(text: bytes) -> str:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return "broken"
        return "twice" if any(text.count(name) > 1 for name in (b'"format"', b'"layers"', b'"a"', b'"b"')) else "read"

    kinds = [kind(damaged_json(DOCUMENT, Random(seed))) for seed in range(500)]
    assert {name: kinds.count(name) >= 10 for name in ("broken", "twice", "read")} == {"broken": True, "twice": True, "read": True}


def test_damaged_structure_keeps_values_and_fits_its_header() -> None:
    seen: set[str] = set()
    for seed in range(300):
        content = damaged_structure(FILE, Random(seed))
        header = json.loads(header_of(content))
        for name, entry in header.items():
            if name in WEIGHTS and (entry["dtype"], entry["shape"]) == ({"a": "F32", "b": "I64"}[name], list(WEIGHTS[name].shape)):
                begin, end = entry["data_offsets"]
                data = content[8 + len(header_of(content)) :][begin:end]
                assert data == WEIGHTS[name].numpy().tobytes() or len(data) != WEIGHTS[name].nbytes
        seen |= {str((entry.get("dtype"), math.prod(entry.get("shape", [])))) for entry in header.values()}
    assert len(seen) > 20


def test_a_resealed_file_has_a_checksum_that_is_right() -> None:
    whole = sealed(FILE)
    right = 0
    for seed in range(200):
        changed = resealed(metadata_only)(whole, Random(seed))
        try:
            check_seal(changed)
        except ValueError:
            continue  # the damage took the checksum itself
        right += changed != whole
    assert right > 120


def read_as(error: Exception | None = None, then: Exception | None = None) -> Reader:
    def use() -> None:
        if then is not None:
            raise then

    def read(folder: Path) -> Callable[[], None]:
        if error is not None:
            raise error
        return use

    return Reader(cases=1, make=lambda folder: None, damage={}, read=read)


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (read_as(BitscapeError("/given/a.json: damaged")), "refused"),
        (read_as(BitscapeError("a.json is damaged")), "refused"),
        (read_as(FileNotFoundError(2, "none", "/given/a.json")), "refused"),
        (read_as(BitscapeError("damaged")), "unnamed"),
        (read_as(KeyError("weight")), "error"),
        (read_as(MemoryError()), "error"),
        (read_as(Wrong("nan")), "wrong"),
        (read_as(), "loaded"),
        (read_as(then=BitscapeError("no such layer")), "refused when used"),
        (read_as(then=TypeError("x")), "error when used"),
        (read_as(then=Wrong("another policy")), "wrong"),
    ],
)
def test_only_named_errors_and_valid_loads_are_good(reader: Reader, kind: str) -> None:
    assert _outcome(reader, Path("/given"), "a.json")[0] == kind


def test_a_process_with_little_memory_gets_no_second_gigabyte() -> None:
    code = "from benchmarks.hardening_fuzz import _limit_memory; _limit_memory(); bytearray(2**29); print('half'); bytearray(2**30 + 2**20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "half\n" and "MemoryError" in done.stderr


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("checkpoint", "report", "folder of tiers", "dynamic folder")])
def test_good_files_are_read(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    reader.make(tmp_path)
    assert all((tmp_path / file).is_file() for file in reader.damage)
    assert _outcome(reader, tmp_path, "") == ("loaded", "")
