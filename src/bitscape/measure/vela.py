"""Arm's compiler Vela for Ethos-U NPUs: what a TFLite file takes there, by the compiler's own performance model.

Vela compresses weights without loss, so that few distinct values take few bits: a file of int8 weights that use 2^b
values costs about b bits a weight, in flash, and in time where reading the flash bounds a layer. Its figures are
estimates of a compiler, not measurements of silicon.
"""

import contextlib
import csv
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bitscape.cost.targets import ETHOS_U
from bitscape.errors import BitscapeError, first_line
from bitscape.exporters.tflite.flatbuffer import names_of, unpacked
from bitscape.folders import scratch_folder
from bitscape.runtimes.packages import runtime_module, silent_process, version_of

ESTIMATED = "by Vela's performance model, not measured on silicon"
"""Stands beside every figure."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What one operator of a file takes."""

    index: int
    """Of the operator in the file that was compiled."""
    ms: float
    """Time in which it keeps the NPU, or the memories that it waits for."""
    sram_bytes: int
    """Working memory in use while it runs."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a file takes on the NPU."""

    ms: float
    """Time of one inference; operators on the CPU are not in it."""
    flash_bytes: int
    """Size of the compiled file: encoded weights, scales, commands, and what runs on the CPU."""
    encoded_bytes: int
    """Of it weights, as they are encoded."""
    sram_bytes: int
    """Working memory at the peak, on the chip."""
    operators: tuple[Operator, ...]
    """What runs on the NPU, as far as Vela tells which operators of the file it came from."""
    on_cpu: tuple[str, ...]
    """Operators that the NPU does not compute."""


@dataclass(frozen=True, kw_only=True)
class Vela:
    """The compiler, for one NPU with a system configuration and a memory mode that Vela takes by default."""

    accelerator: str = ETHOS_U[2]
    """One of ETHOS_U."""

    def __post_init__(self) -> None:
        if self.accelerator not in ETHOS_U:
            raise BitscapeError(f"accelerator={self.accelerator!r}: allowed are {', '.join(ETHOS_U)}")

    @property
    def version(self) -> str:
        """Name and version."""
        return f"vela {version_of('ethos-u-vela', 'ethosu.vela')}"

    def compile(self, content: bytes) -> Compiled:
        """Compile a TFLite file, given by its content.

        Raises BitscapeError if the package of the extra "ethos-u" is missing, or Vela does not take the file.
        """
        with scratch_folder() as folder:
            (folder / "net.tflite").write_bytes(content)
            options = ["--accelerator-config", self.accelerator, "--output-dir", str(folder), "--enable-debug-db"]
            _run([str(folder / "net.tflite"), *options])
            return _read(folder)


def _run(arguments: list[str]) -> None:
    """Call Vela's command without what it prints; it sets how deep Python recurses."""
    main, limit, said = runtime_module("ethosu.vela.vela").main, sys.getrecursionlimit(), io.StringIO()
    try:
        with silent_process(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            failed = main(arguments)
    except (Exception, SystemExit) as error:
        raise BitscapeError(f"the file: Vela does not compile it: {first_line(error)}") from error
    finally:
        sys.setrecursionlimit(limit)
    if failed:
        lines = said.getvalue().strip().splitlines() or [""]
        raise BitscapeError(f"the file: Vela does not compile it: {lines[-1]}")


def _read(folder: Path) -> Compiled:
    (summary_file,) = folder.glob("net_summary_*.csv")
    (summary,) = csv.DictReader(io.StringIO(summary_file.read_text()))
    content = (folder / "net_vela.tflite").read_bytes()
    return Compiled(
        ms=1000 * float(summary["inference_time"]),
        flash_bytes=len(content),
        encoded_bytes=int(float(summary["total_npu_encoded_weights"])),
        sram_bytes=round(1024 * float(summary["sram_memory_used"])),
        operators=tuple(_operators(folder / "net_debug.xml", float(summary["core_clock"]))),
        on_cpu=tuple(_on_cpu(content)),
    )


def _operators(database: Path, clock: float) -> Iterator[Operator]:
    tables = {table.get("name"): _rows(table.text or "") for table in ElementTree.parse(database).iter("table")}
    sources = {row["id"]: int(row["ext_key"]) for row in tables["source"]}
    for row in tables["perf"]:
        if row["source_id"] in sources:
            index, ms = sources[row["source_id"]], 1000 * int(row["op_cycles"]) / clock
            yield Operator(index=index, ms=ms, sram_bytes=int(row["staging_usage"]))


def _rows(text: str) -> list[Mapping[str, str]]:
    return list(csv.DictReader(io.StringIO(text.strip())))


def _on_cpu(content: bytes) -> Iterator[str]:
    """Operators of a compiled file beside those that call the NPU."""
    model, names = unpacked(content), names_of("BuiltinOperator")
    for graph in model.subgraphs:
        for operator in graph.operators:
            code: Any = model.operatorCodes[operator.opcodeIndex]
            name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
            if name != "CUSTOM" or b"ethos-u" not in (code.customCode or b""):
                yield name
