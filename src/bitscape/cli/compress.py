"""`bitscape compress`: from a float network to checked files, with the float network and uniform bits beside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from bitscape.cli.latency import load_target
from bitscape.cli.network import ImageSettings, draw_samples, load_batches, load_network
from bitscape.cli.options import (
    budget_option,
    data_options,
    image_options,
    keep_float_option,
    latency_option,
    method_options,
    network_options,
    pin_option,
    repair_options,
    samples_option,
    seed_option,
    target_option,
    task_option,
)
from bitscape.cli.output import print_table
from bitscape.cli.parsing import make_method, parse_candidates, parse_pins, parse_repair
from bitscape.cli.paths import SOURCE, OutputFile
from bitscape.errors import BitscapeError

if TYPE_CHECKING:
    from bitscape.engine.task import TaskName
    from bitscape.verbs.quantize import Repair

FILES = OutputFile({".onnx": (), ".xml": (".bin",), ".tflite": (), ".safetensors": (), ".json": ()})


@click.command()
@network_options
@data_options
@image_options
@budget_option
@click.option(
    "--to",
    required=True,
    multiple=True,
    type=FILES,
    metavar="FILE",
    help="File to write, repeatable: .onnx for ONNX Runtime, .xml for OpenVINO, .tflite for LiteRT, "
    ".qonnx.onnx for FINN and hls4ml, .safetensors packed, .json for the policy.",
)
@click.option(
    "--test",
    type=SOURCE,
    metavar="SOURCE",
    help="Labelled images to measure on. Default: how far outputs are from the float network's, on a quarter of --data.",
)
@click.option("--test-split", metavar="NAME", help="Split of --test, where it has several.  [default: the one for evaluation]")
@samples_option
@method_options
@repair_options
@task_option
@latency_option
@target_option
@pin_option
@keep_float_option
@seed_option
def compress(
    model: str,
    weights: Path | None,
    device: str | None,
    data: str,
    split: str | None,
    input_size: int | None,
    normalize: str | None,
    budgets: tuple[str, ...],
    to: tuple[Path, ...],
    test: str | None,
    test_split: str | None,
    images: int | None,
    method_name: str,
    settings: tuple[str, ...],
    candidates: str | None,
    repair: "Repair | Literal['none'] | None",
    repair_folder: Path | None,
    task: "TaskName",
    latency: Path | None,
    target_name: str | None,
    pins: tuple[str, ...],
    keep_float: tuple[str, ...],
    seed: int,
) -> None:
    """Find bits, quantize, measure beside float and uniform bits, and write checked files.

    \b
    Example:
      bitscape compress --model timm:resnet18 --weights resnet18.safetensors \\
        --data photos/ --input-size 224 --normalize imagenet --budget 4bit \\
        --to resnet18.onnx --to policy.json
    """
    if not budgets:
        raise BitscapeError("--budget is missing; give at least one, e.g. --budget 4bit, bitops=0.25x or weight_bytes=1.2MB")
    from bitscape.data.splits import EVALUATION, TRAINING
    from bitscape.verbs.compress import check_files
    from bitscape.verbs.compress import compress as compress_network
    from bitscape.verbs.search import check_request

    method, pinned = make_method(method_name, settings), parse_pins(pins)
    chosen_repair = parse_repair(repair, repair_folder)
    offered = None if candidates is None else parse_candidates(candidates)
    times, target = load_target(latency, target_name)
    check_request(method, budgets, candidates=offered, target=target, latency=times)
    check_files(to)
    seen = ImageSettings.checked(input_size, normalize, data, test)
    network = load_network(model, weights, device, seed)
    seen = seen.of_model(network)
    samples = draw_samples(data, split or TRAINING, images, seen, seed)
    compression = compress_network(
        network,
        samples,
        budgets,
        to,
        method=method,
        repair=chosen_repair,
        repair_folder=repair_folder,
        task=task,
        evaluation=None if test is None else load_batches(test, test_split or EVALUATION, seen, None, network),
        count=len(samples),
        candidates=offered,
        pinned=pinned,
        keep_float=keep_float,
        target=target,
        latency=times,
        seed=seed,
    )
    table = compression.table()
    click.echo(f"{table.title}\n")
    print_table(table.columns, table.rows)
    if compression.result.gain is not None:
        click.echo(f"\n{compression.result.gain}")
    click.echo(f"\n{table.note}" if table.note else "")
    for path in to:
        click.echo(f"written: {path}")
