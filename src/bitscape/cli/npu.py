"""What commands say of Ethos-U NPUs, by Arm's compiler Vela."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitscape.cli.output import amount, print_table, short_names
from bitscape.cost.targets import ETHOS_U
from bitscape.errors import BitscapeError
from bitscape.files import write_atomic
from bitscape.version import __version__

if TYPE_CHECKING:
    from bitscape.measure.vela import Vela

VELA = "vela"
ROUNDS = 15
"""Of runtimes, where nobody says how many."""
accelerator_option = click.option(
    "--accelerator", type=click.Choice(ETHOS_U), help=f"NPU that Vela compiles for.  [default: {ETHOS_U[2]}]"
)


def vela_of(runtime: str, accelerator: str | None, threads: int, rounds: int, batch_size: int) -> "Vela | None":
    """The compiler that --runtime and --accelerator name; None for a runtime of this machine's CPU.

    Raises BitscapeError for options that do not go together.
    """
    from bitscape.measure.vela import Vela

    if runtime != VELA:
        if accelerator is not None:
            raise BitscapeError(f"--accelerator {accelerator} is for --runtime {VELA}; leave it out, or give both")
        return None
    if (threads, rounds, batch_size) != (1, ROUNDS, 1):
        raise BitscapeError(f"--runtime {VELA} estimates one image at a time: leave --threads, --rounds and --batch-size out")
    return Vela(accelerator=accelerator or ETHOS_U[2])


def bench_vela(
    files: Sequence[Path],
    runtimes: Sequence[str],
    accelerator: str | None,
    threads: int,
    json_file: Path | None,
    given: Mapping[str, Any],
) -> None:
    """Compile TFLite files and print what each takes.

    Raises BitscapeError for other files or runtimes, and for options of files that run.
    """
    from bitscape.measure.vela import ESTIMATED

    if not files or any(file.suffix != ".tflite" for file in files) or tuple(runtimes) != (VELA,):
        raise BitscapeError(f"--runtime {VELA} compiles .tflite files alone; give some, and no other runtime")
    if set_options := [name for name in ("model", "data", "accuracy") if given[name] is not None]:
        raise BitscapeError(f"--runtime {VELA} runs no image: leave --{set_options[0]} out")
    vela = vela_of(VELA, accelerator, threads, given["rounds"], int(given["batch_sizes"]))
    assert vela is not None
    compiled = {str(file): vela.compile(file.read_bytes()) for file in files}
    rows = [
        {
            "file": name,
            "file_bytes": Path(name).stat().st_size,
            "ms": one.ms,
            "flash_bytes": one.flash_bytes,
            "encoded_bytes": one.encoded_bytes,
            "sram_bytes": one.sram_bytes,
            "on_cpu": sorted(one.on_cpu),
        }
        for name, one in compiled.items()
    ]
    if json_file is not None:
        source = {"format": 1, "tool": f"bitscape {__version__}", "runtime": vela.version, "estimated": ESTIMATED}
        document = {**source, "accelerator": vela.accelerator, "rows": rows}
        write_atomic(json_file, json.dumps(document, indent=1) + "\n")
    names = short_names(list(compiled))
    first = next(iter(compiled.values()))
    table = [
        [
            names[name],
            f"{one.ms:.4g}",
            f"{first.ms / one.ms:.2f}",
            amount(one.flash_bytes, "B"),
            amount(one.encoded_bytes, "B"),
            amount(one.sram_bytes, "B"),
            ", ".join(sorted(set(one.on_cpu))) or "none",
        ]
        for name, one in compiled.items()
    ]
    columns = ["file", "ms", f"x {names[str(files[0])]}", "flash", "of it weights", "SRAM", "operators on the CPU"]
    print_table(columns, table)
    click.echo(f"\n{vela.version}, {vela.accelerator}; {ESTIMATED}")
    if json_file is not None:
        click.echo(f"figures: {json_file}")
