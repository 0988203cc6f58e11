"""Files made to hurt: small ones that claim or unpack to much, nest deep, or take time that grows with the square of their size.

    python -m benchmarks.hardening_hostile READER FOLDER     the inner process: one JSON line a file

Each is read in a fork of that process, with a gigabyte of memory above the start and 10 seconds of CPU. Good are the same outcomes as
for damaged files: an error that names the file, or a file that is read and holds what it may hold.
"""

import io
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hardening_data import Reader
from benchmarks.hardening_fuzz import GOOD, START_S, _limit_memory, _outcome

MOST_S = 10.0
DEEP = 100_000
Files = Mapping[str, bytes]
"""Path below the reader's folder -> content."""
Make = Callable[[Files], Files]
"""The good files to the hostile ones, of which only those that change need be there."""


def _nested(brackets: int = DEEP) -> bytes:
    return b"[" * brackets + b"]" * brackets


def _changed_json(file: str, **entries: Any) -> Make:
    """The good JSON file with entries replaced; numbers may be texts of digits within <>."""

    def make(good: Files) -> Files:
        text = json.dumps({**json.loads(good[file]), **entries})
        return {file: text.replace('"<', "").replace('>"', "").encode()}

    return make


def _json_files(file: str, entry: str) -> dict[str, Make]:
    """What is tried on every JSON file that has an object `entry`."""
    long, twice = "x" * 50_000_000, ",".join(f'"layer{at}": 1' for at in range(150_000))
    digits = f"<1{'0' * 309}>"
    return {
        "number of 310 digits": _changed_json(file, cost={"bitops": digits}, network_ms=digits, repairs=digits),
        "number of 10 million digits": lambda good: {file: b'{"format": 1, "layers": {"a": ' + b"1" * 10_000_000 + b"}}"},
        "nested 100,000 deep": lambda good: {file: b'{"format": 1, "%s": ' % entry.encode() + _nested() + b"}"},
        "a text of 50 MB": _changed_json(file, **{entry: long}),
        "a name of 10 MB": _changed_json(file, **{entry: {"x" * 10_000_000: 1}}),
        "150,000 names, the last twice": lambda good: {file: f'{{"format": 1, "{entry}": {{{twice}, "layer149999": 1}}}}'.encode()},
        "5 million empty lists": lambda good: {file: b'{"format": 1, "%s": [' % entry.encode() + b"[]," * 5_000_000 + b"[]]}"},
        "1e999": _changed_json(file, cost={"bitops": "<1e999>"}, network_ms="<1e999>", repairs="<1e999>"),
        "escape sequences": _changed_json(file, **{entry: {"\x1b[2J\x1b]0;owned\x07\u202e": 1}}),
    }


def _many_layers(good: Files) -> Files:
    layers = {f"layer{at}.conv": {"weight": 4, "activation": 4} for at in range(150_000)}
    return {"policy.json": json.dumps({"format": 1, "layers": layers}).encode()}


def _many_candidates(good: Files) -> Files:
    pairs = [f"{weight}/{activation}" for weight in range(1, 9) for activation in range(1, 9)]
    return {"scores.json": _edited(good["scores.json"], candidates=pairs + pairs[-1:] * 2_000_000)}


def _edited(content: bytes, **entries: Any) -> bytes:
    return json.dumps({**json.loads(content), **entries}).encode()


def _safetensors(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _opened(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _with_metadata(file: str, text: str) -> Make:
    """The good file with another JSON text in its metadata, and a checksum that is right."""

    def make(good: Files) -> Files:
        from bitscape.files import UNSEALED, sealed

        header, data = _opened(good[file])
        header["__metadata__"] = {"bitscape": text.replace("CHECKSUM", f'"checksum": "{UNSEALED}"')}
        return {file: sealed(_safetensors(header, data))}

    return make


def _tensor_files(file: str) -> dict[str, Make]:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return {
        "header of 2^62 bytes": lambda good: {file: struct.pack("<Q", 2**62) + b"{}"},
        "header of 90 MB": lambda good: {file: _safetensors({f"layer{at:07}": empty for at in range(1_000_000)})},
        "100,000 unknown tensors": lambda good: {file: _safetensors({f"layer{at}.weight": empty for at in range(100_000)})},
        "a shape of 2^80": lambda good: {file: _safetensors({"a": {**empty, "shape": [2**40, 2**40]}})},
        "a shape with a 0 and 2^62": lambda good: {file: _safetensors({"a": {**empty, "shape": [0, 2**62, 2**62]}})},
        "overlapping tensors": lambda good: {
            file: _safetensors({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}, bytes(4))
        },
        "header nested 100,000 deep": lambda good: {file: _safetensors(b'{"a": ' + _nested() + b"}")},
    }


def _sealed_files(file: str) -> dict[str, Make]:
    return {
        "metadata nested 100,000 deep": _with_metadata(file, '{"format": 1, CHECKSUM, "layers": ' + _nested().decode() + "}"),
        "metadata that is a list": _with_metadata(file, "[1, {CHECKSUM}]"),
        "metadata without entries": _with_metadata(file, '{"format": 1, CHECKSUM}'),
        "metadata with 310 digits": _with_metadata(file, '{"format": 1, CHECKSUM, "epoch": 1%s, "layers": {}}' % ("0" * 309)),
    }


def _npz(**arrays: Any) -> Make:
    def make(good: Files) -> Files:
        file = io.BytesIO()
        np.savez_compressed(file, **{"images": np.zeros((2, 8, 8), np.uint8), **arrays})
        return {"data.npz": file.getvalue()}

    return make


def _npz_entry(name: str, header: bytes, zeros: int) -> Make:
    """An .npz file whose entry `name` is an .npy header and zeros, which take a thousandth."""

    def make(good: Files) -> Files:
        file = io.BytesIO()
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(f"{name}.npy", "w") as entry:
            entry.write(start)
            for _ in range(zeros // 2**20):
                entry.write(bytes(2**20))
        with zipfile.ZipFile(io.BytesIO(_npz()(good)["data.npz"])) as small, zipfile.ZipFile(file, "a") as archive:
            for part in small.namelist():
                if part != f"{name}.npy":
                    archive.writestr(part, small.read(part))
        return {"data.npz": file.getvalue()}

    return make


def _described(dtype: str, shape: str) -> bytes:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def _png(width: int, height: int) -> bytes:
    """A PNG image of black pixels: a bit each."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", content) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nnewpath 0 0 moveto 8 8 lineto stroke showpage\n%%EOF\n"


def _pictures(name: str, content: Callable[[], bytes], count: int = 1) -> Make:
    return lambda good: {f"images/{at}{name}": content() for at in range(count)}


def _parquet(rows: int, label: int | None = 0, image: bytes = b"x", nulls: bool = False) -> Make:
    """A parquet file of equal rows, in one group: a few bytes stand for all of them."""

    def make(good: Files) -> Files:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        file = io.BytesIO()
        zeros = arrow.array(np.zeros(rows, np.int32))
        columns = {"image": arrow.nulls(rows, arrow.binary()) if nulls else arrow.DictionaryArray.from_arrays(zeros, arrow.array([image]))}
        if label is not None:
            columns["label"] = arrow.DictionaryArray.from_arrays(zeros, arrow.array([label], arrow.uint64()))
        parquet.write_table(arrow.table(columns), file, row_group_size=rows, compression="zstd", store_schema=False)
        return {"data.parquet": file.getvalue()}

    return make


def _tar(*members: tuple[str, bytes, dict[str, Any]]) -> Make:
    """A tar of an image and of members: name, content, and what the header says instead of the truth."""

    def make(good: Files) -> Files:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, content, claims in (("000.png", _png(8, 8), {}), *members):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                for field, value in claims.items():
                    setattr(member, field, value)
                file.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
                file.write(content + bytes(-len(content) % 512))
                tar.offset = file.tell()
        return {"data.tar": file.getvalue()}

    return make


def _sparse_tar(name: str, size: int) -> Make:
    """A file of `size` bytes of which 512 are stored, as GNU tar writes it with --sparse."""

    def make(good: Files) -> Files:
        header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
        header[124:136], header[156:157] = b"%011o\0" % 512, b"S"
        header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
        header[483:495] = (0x80 << 88 | size).to_bytes(12, "big")
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        return {"data.tar": _tar()(good)["data.tar"][: 512 * 2] + bytes(header) + bytes(512) + bytes(1024)}

    return make


def _npy_of(file: str, dtype: str, shape: str) -> dict[str, Make]:
    header = _described(dtype, shape)
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    return {f"{file} that claims {shape}": lambda good: {file: content}}


_METRICS = b'{"epoch": 1}\n'
HOSTILE: dict[str, dict[str, Make]] = {
    "policy": {**_json_files("policy.json", "layers"), "150,000 unknown layers": _many_layers},
    "scores": {**_json_files("scores.json", "scores"), "2 million candidates": _many_candidates},
    "latency table": _json_files("latency.json", "layers"),
    "packed": _tensor_files("packed.safetensors") | _sealed_files("packed.safetensors"),
    "weights": _tensor_files("model.safetensors"),
    "checkpoint": _tensor_files("checkpoint.safetensors") | _sealed_files("checkpoint.safetensors"),
    "dynamic folder": {
        **_json_files("dynamic.json", "static"),
        "input of 2^62 pixels": _changed_json("dynamic.json", input_shape=[3, 2**31, 2**31]),
    },
    "folder of tiers": _json_files("tiers.json", "tiers") | {"a share of 1e999": _changed_json("tiers.json", gate_bitops="<1e999>")},
    "report": {
        **_json_files("run/run.json", "settings"),
        "metrics of 50 MB": lambda good: {"run/metrics.jsonl": _METRICS * 4_000_000},
        "metrics nested 100,000 deep": lambda good: {"run/metrics.jsonl": b'{"epoch": ' + _nested() + b"}\n"},
        "cells of 1e999": lambda good: {"grid.json": good["grid.json"].replace(b"80.0", b"1e999")},
        "a cell of 310 digits": lambda good: {"grid.json": good["grid.json"].replace(b"100", b"1" + b"0" * 309)},
        "bench nested 100,000 deep": lambda good: {"bench.json": b'{"format": 1, "rows": ' + _nested() + b"}"},
    },
    "npz": {
        "images of 1.9 GB in 10 MB": _npz_entry("images", _described("|u1", "(1900, 1024, 1024)"), 1900 * 2**20),
        "1.5 GB that are not used": _npz_entry("other", _described("|u1", "(1500, 1024, 1024)"), 1500 * 2**20),
        "images that claim 2^60": _npz_entry("images", _described("|u1", f"({2**60}, 1, 1)"), 2**20),
        "class names of 256 MB": _npz_entry("class_names", _described("<U67108864", "(1,)"), 2**28),
        "labels of 200 MB": _npz_entry("labels", _described("<i8", f"({25 * 2**20},)"), 200 * 2**20),
        "one label": _npz(labels=np.int64(3)),
        "one class name": _npz(labels=np.array([0, 0]), class_names=np.array("cat")),
        "one pixel": _npz(images=np.uint8(3)),
        "a label of 2^63": _npz(labels=np.array([0, 2**63], np.uint64)),
        "a label of 2^40": _npz(labels=np.array([0, 2**40])),
    },
    "parquet": {
        "a label of 2^63": _parquet(3, 2**63, _png(8, 8)),
        "100 million rows": _parquet(100_000_000),
        "9 million rows without an image": _parquet(9_000_000, nulls=True),
        "20,000 times an image of 1 MB": _parquet(20_000, image=b"x" * 2**20),
        "3 pictures of 90 million pixels": _parquet(3, image=_png(9_400, 9_500)),
    },
    "folder of images": {
        "Postscript by the name of a PNG": _pictures(".png", lambda: EPS),
        "a picture of 2^60 pixels": _pictures(".png", lambda: _png(2**30, 1)[:64]),
        "3 pictures of 90 million pixels": _pictures(".png", lambda: _png(9_400, 9_500), 3),
        "a picture of one row": _pictures(".png", lambda: _png(80_000_000, 1)),
        "a name of escape sequences": _pictures("\x1b[2J\x1b]0;owned\x07.png", lambda: b"no image", 4),
    },
    "tar": {
        "a label of 2^64": _tar(("000.cls", str(2**64).encode(), {})),
        "a label nested 100,000 deep": _tar(("000.json", _nested(), {})),
        "a label of 8 TB": _tar(("000.cls", b"0", {"size": 2**43})),
        "an image of 8 TB": _tar(("001.png", b"0", {"size": 2**43})),
        "a label of 4 GB in 512 bytes": _sparse_tar("000.cls", 2**32),
        "an image of 4 GB in 512 bytes": _sparse_tar("001.png", 2**32),
        "a header of 8 TB": _tar(("header", b"0", {"type": tarfile.XHDTYPE, "size": 2**43})),
        "a name of 8 TB": _tar(("name", b"0", {"type": tarfile.GNUTYPE_LONGNAME, "size": 2**43})),
        "Postscript by the name of a PNG": _tar(*((f"{at:03}.png", EPS, {}) for at in range(1, 4))),
        "names above the folder": _tar(("../../outside.png", _png(8, 8), {}), ("/etc/outside.png", _png(8, 8), {})),
    },
    "mapped images": _npy_of("kept.npy", "|u1", f"({2**40}, 3, 9, 9)") | _npy_of("kept.kept.npy", "<i8", f"({2**60},)"),
    "cached images": _npy_of("kept.npy", "|u1", f"({2**40}, 3, 9, 9)"),
}


def read_hostile(reader: str) -> dict[str, Any]:
    """Read the hostile files of a reader. Returns counts, what came of each, and the most that one took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.hardening_hostile", reader, folder]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{reader}: {done.stderr[-500:]}")
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        "cases": len(outcomes),
        **{kind.replace(" ", "_"): sum(outcome["kind"] == kind for outcome in outcomes) for kind in GOOD},
        "bad": sum(outcome["kind"] not in GOOD for outcome in outcomes),
        "bad_cases": [outcome for outcome in outcomes if outcome["kind"] not in GOOD],
        "slowest_s": max(outcome["seconds"] for outcome in outcomes),
        "above_start_mib": max(outcome.get("above_start_mib", 0.0) for outcome in outcomes),
        "files": {outcome["case"]: outcome["kind"] for outcome in outcomes},
    }


def main(name: str, folder: Path) -> None:
    """Read the hostile files of a reader, each in a fork of this process, and print what came of each."""
    import logging

    import torch

    from benchmarks.hardening_readers import READERS

    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    logging.disable()
    reader = READERS[name]
    reader.make(folder)
    reader.read(folder)()  # also loads what is imported late
    good = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for case, make in HOSTILE[name].items():
        _put(folder, good)
        _in_fork(lambda make=make: _put(folder, make(good)), START_S)  # type: ignore[misc]  # its memory is not that of the reader
        outcome = _in_fork(lambda: _timed(reader, folder), 10 * MOST_S) or {"kind": "crash or hang", "seconds": 10 * MOST_S}
        print(json.dumps({"case": case, **outcome}), file=out, flush=True)


def _put(folder: Path, files: Files) -> None:
    for file, content in files.items():
        (folder / file).write_bytes(content)


def _timed(reader: Reader, folder: Path) -> dict[str, Any]:
    """What comes of reading the folder, with the seconds and the memory that it takes, within a limit of memory."""
    _limit_memory()
    before, started = _peak_mib(), time.process_time()  # of this process: others may be busy
    kind, why = _outcome(reader, folder, Path(next(iter(reader.damage))).name)
    seconds = round(time.process_time() - started, 2)
    kind = "slow" if kind in GOOD and seconds > MOST_S else kind
    return {"kind": kind, "why": why, "seconds": seconds, "above_start_mib": round(_peak_mib() - before, 1)}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _in_fork(work: Callable[[], dict[str, Any] | None], most_s: float) -> dict[str, Any] | None:
    """What `work` returns, called in a fork of this process; None if the fork ends otherwise, or takes longer than `most_s`."""
    answers, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(answer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(answer)
    with open(answers, "rb") as stream:
        text = stream.read() if select.select([answers], [], [], most_s)[0] else b""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    result: dict[str, Any] | None = json.loads(text) if text else None
    return result


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
