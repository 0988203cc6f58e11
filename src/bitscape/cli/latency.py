"""`bitscape latency`: times measured on the machine that a network shall run on; and what other commands read of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.bench import RUNTIME_NAMES, random_images, threads_option
from bitscape.cli.network import ImageSettings, load_latency, load_network, measure_network, normalized_images
from bitscape.cli.npu import VELA, accelerator_option, vela_of
from bitscape.cli.options import COUNT, MOST, image_options, model_option, seed_option
from bitscape.cli.output import amount, print_table
from bitscape.cli.parsing import parse_candidates, parse_shape
from bitscape.cli.paths import FILE, SOURCE, OutputFile, keep_locked
from bitscape.cost.targets import TARGETS, Target
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits

if TYPE_CHECKING:
    from bitscape.cost.latency import LatencyTable
    from bitscape.cost.layers import NetworkProfile

OWN_TARGET = {**dict(zip(RUNTIME_NAMES, ("onnx-container", "openvino"), strict=True)), VELA: "ethos-u"}
MOST_COLUMNS = 8
IMAGES = 32
"""Images that calibrate, where nobody says how many."""


def load_target(table_file: Path | None, target_name: str | None) -> "tuple[LatencyTable | None, Target | None]":
    """Return what --latency and --target name; that they are of two targets is told on stderr, before any time is spent on a search."""
    table, target = load_latency(table_file), None if target_name is None else TARGETS[target_name]
    if table is not None and target is not None and (note := target.runtime_note(table)):
        click.echo(f"warning: {note}", err=True)
    return table, target


@click.group(invoke_without_command=True)
@click.pass_context
def latency(context: click.Context) -> None:
    """Measure what layers take on this machine."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@latency.command()
@model_option
@click.option("--weights", type=FILE, metavar="FILE", help="Float weights, .safetensors or .pt. Default: as built.")
@click.option("--data", type=SOURCE, metavar="SOURCE", help="Images that set the ranges of the 8-bit network.  [default: random]")
@click.option("--images", type=click.IntRange(2, MOST), help=f"Images drawn for it.  [default: {IMAGES}]")
@image_options
@click.option("--input-shape", metavar="CxHxW", help="Instead of --data: shape of one image, e.g. 3x224x224.")
@click.option(
    "--runtime",
    default=RUNTIME_NAMES[0],
    show_default=True,
    type=click.Choice((*RUNTIME_NAMES, VELA)),
    help="What runs the layers, or compiles them for an NPU.",
)
@accelerator_option
@click.option("--candidates", metavar="BITS", help="Widths to measure, in all pairs; or w=2,4,8;a=8.  [default: those of --target]")
@click.option("--target", type=click.Choice(list(TARGETS)), help="Measure the bits of this target.  [default: the runtime's]")
@click.option(
    "--coarseness",
    type=click.FloatRange(0.1, 10),
    metavar="X",
    help="Of vela: scales of weights, times those of the least squared error. 2 lets the compiler encode weights in fewer "
    "bits at equal error; a policy found by the table is for networks of this coarseness.  [default: 1]",
)
@click.option("--batch-size", default=1, show_default=True, type=COUNT, help="Images at once.")
@threads_option
@click.option("--rounds", default=15, show_default=True, type=COUNT, help="Visits of each model; the quickest counts.")
@click.option(
    "--out", required=True, type=OutputFile(".json", also=(".json.partial",)), metavar="FILE", help="Where the table goes, .json."
)
@seed_option
def build(
    model: str,
    weights: Path | None,
    data: str | None,
    images: int | None,
    input_size: int | None,
    normalize: str | None,
    input_shape: str | None,
    runtime: str,
    accelerator: str | None,
    candidates: str | None,
    target: str | None,
    coarseness: float | None,
    batch_size: int,
    threads: int,
    rounds: int,
    out: Path,
    seed: int,
) -> None:
    """Measure each layer at each pair of bits, and write the table for `bitscape search --latency`.

    Run it on the target machine, with nothing else running. A run that was stopped goes on where it was: give the same command.

    With --runtime vela nothing runs: Arm's compiler tells time, flash and SRAM on an Ethos-U NPU by its performance model, from the
    network's own weights at each pair of bits.

    \b
    Example:
      bitscape latency build --model timm:resnet18 --input-shape 3x224x224 \\
        --runtime openvino --out resnet18-latency.json
      bitscape search --latency resnet18-latency.json --budget latency_ms=2.5 ...
      bitscape latency build --model timm:mobilenetv2_100 --data train/ --input-size 224 \\
        --normalize imagenet --runtime vela --accelerator ethos-u55-128 --out u55.json
    """
    from bitscape.measure.layer_times import build_table
    from bitscape.report.records import environment
    from bitscape.runtimes.sessions import RUNTIMES

    shape, pairs = parse_shape(input_shape), _pairs(candidates, target or OWN_TARGET[runtime])
    if (data is None) == (shape is None):
        raise BitscapeError("give --input-shape for random images, e.g. 3x224x224, or --data; exactly one of the two")
    npu = vela_of(runtime, accelerator, threads, rounds, batch_size)
    if npu is None and coarseness is not None:
        raise BitscapeError(f"--coarseness {coarseness:g} is for --runtime {VELA}: times in other runtimes do not depend on it")
    settings = ImageSettings.checked(input_size, normalize, data)
    keep_locked(out.parent, out.name)
    network = load_network(model, weights, "cpu", seed)
    if data is not None:
        drawn = normalized_images(data, images, settings.of_model(network), seed, network, usual=IMAGES)
    else:
        assert shape is not None
        drawn = random_images(images or IMAGES, shape, seed)
    measured = measure_network(network, tuple(drawn.shape[1:]))
    if npu is not None:
        from bitscape.measure.npu_table import build_npu_table

        table = build_npu_table(network, drawn, pairs, npu, coarseness=coarseness or 1.0)
        table.save(out)
        _print_npu(table, measured)
        click.echo(f"\ntable: {out}; use it: bitscape search --target ethos-u --latency {out} --budget flash_bytes=0.5x")
        return
    partial = out.with_name(f"{out.name}.partial")
    try:
        table = build_table(
            network,
            drawn,
            pairs,
            RUNTIMES[runtime](threads=threads),
            machine=environment()["cpu"],
            partial=partial,
            batch_size=batch_size,
            rounds=rounds,
        )
    except KeyboardInterrupt:
        kept = f"{partial} keeps what is measured; run the same command to go on" if partial.is_file() else ""
        raise click.Abort(kept) from None
    table.save(out)
    partial.unlink(missing_ok=True)
    _print(table, measured)
    click.echo(f"\ntable: {out}; use it: bitscape search --latency {out} --budget latency_ms=...")


def _pairs(candidates: str | None, target: str) -> tuple[LayerBits, ...]:
    if candidates is not None:
        return parse_candidates(candidates)
    return tuple(LayerBits(w, a) for w in TARGETS[target].weight_bits for a in TARGETS[target].activation_bits)


def _print(table: "LatencyTable", network: "NetworkProfile") -> None:
    pairs = shown_pairs(list(next(iter(table.layers.values()))))
    rows = []
    for layer in network.layers:
        times = table.layers[layer.name]
        rows.append([layer.name, layer.kind, amount(layer.macs), *(_microseconds(times[pair]) for pair in pairs)])
    sums = {pair: sum(times[pair] for times in table.layers.values()) for pair in pairs}
    rows.append(["all layers", "", amount(network.covered_macs), *(_microseconds(value) for value in sums.values())])
    print_table(["us of a layer alone, at", "kind", "MACs of an image", *pairs], rows, left=2)
    assert table.float_ms is not None  # of a runtime
    faster = f"8/8 is {table.float_ms / table.network_ms:.2f} times as fast"
    click.echo(f"\nwhole network: {table.network_ms:.4g} ms at 8/8, {table.float_ms:.4g} ms in float ({faster}); {table.where}")
    click.echo(table.note() or f"fewer bits take it down to {100 * table.spread():.1f} % of its time at 8/8")


def _print_npu(table: "LatencyTable", network: "NetworkProfile") -> None:
    pairs = shown_pairs(list(next(iter(table.layers.values()))))
    rows = [
        [layer.name, layer.kind, *(_microseconds(table.layers[layer.name][pair]) for pair in pairs)]
        for layer in network.layers
    ]
    ms = [sum(times[pair] for times in table.layers.values()) for pair in pairs]
    rows += [["all layers", "", *map(_microseconds, ms)]]
    rows += [["flash of all", "", *(amount(sum(row[pair] for row in table.flash.values()), "B") for pair in pairs)]]
    rows += [["SRAM at the peak", "", *(amount(max(row[pair] for row in table.sram.values()), "B") for pair in pairs)]]
    print_table(["us of a layer, at", "kind", *pairs], rows, left=2)
    click.echo(f"\n{table.where}")
    if (note := table.note()) is not None:
        click.echo(note)


def shown_pairs(pairs: Sequence[str]) -> list[str]:
    """All, or, where these are many, those with activations of 8 bits and one with fewer."""
    narrow = [pair for pair in pairs if not pair.endswith("/8")]
    return list(pairs) if len(pairs) <= MOST_COLUMNS else [pair for pair in pairs if pair not in narrow[1:]]


def _microseconds(ms: float) -> str:
    return f"{1000 * ms:.4g}"
