"""`bitscape analyze`: which layers of a network its quantization error comes from."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

import bitscape as bs
from bitscape.cli.network import ImageSettings, draw_samples, load_network
from bitscape.cli.options import (
    COUNT,
    data_options,
    image_options,
    network_options,
    samples_option,
    seed_option,
    task_option,
)
from bitscape.cli.output import print_table
from bitscape.cli.paths import FILE, OutputFile
from bitscape.errors import BitscapeError, prefixed
from bitscape.policy import LayerBits, Policy

if TYPE_CHECKING:
    from bitscape.engine.task import TaskName

USUAL_BITS, USUAL_COMPARED = "4/8", 16


@click.command()
@network_options
@data_options
@image_options
@click.option(
    "--bits",
    metavar="W/A",
    help=f"Bits of weights and inputs of every layer.  [default: {USUAL_BITS}]",
)
@click.option("--policy", "policy_file", type=FILE, metavar="FILE", help="Bits of each layer.")
@click.option(
    "--packed", type=FILE, metavar="FILE", help="Analyze a packed file of this network instead."
)
@samples_option
@click.option(
    "--compared",
    type=COUNT,
    default=USUAL_COMPARED,
    show_default=True,
    help="Of these, images whose outputs are compared, in two passes for each layer.",
)
@task_option
@click.option("--layers", type=COUNT, help="Layers shown, the worst first.  [default: all]")
@click.option(
    "--out",
    type=OutputFile(".json"),
    metavar="FILE",
    help="Where the analysis goes, .json, for `bitscape report`.",
)
@seed_option
def analyze(
    model: str,
    weights: Path | None,
    device: str | None,
    data: str,
    split: str | None,
    input_size: int | None,
    normalize: str | None,
    bits: str | None,
    policy_file: Path | None,
    packed: Path | None,
    images: int | None,
    compared: int,
    task: "TaskName",
    layers: int | None,
    out: Path | None,
    seed: int,
) -> None:
    """Find the layers that the error of a quantized network comes from.

    Each layer is quantized alone, and left out alone; labels of the images are not used.

    \b
    Example:
      bitscape analyze --model timm:resnet18 --weights resnet18.safetensors \\
        --data photos/ --input-size 224 --normalize imagenet --bits 4/8 --layers 10
    """
    if sum(option is not None for option in (bits, policy_file, packed)) > 1:
        raise BitscapeError("--bits, --policy and --packed: give at most one of them")
    from bitscape.data.splits import TRAINING

    with prefixed("--bits"):
        uniform = LayerBits.parse(bits or USUAL_BITS)
    policy = uniform if policy_file is None else Policy.load(policy_file)
    seen = ImageSettings.checked(input_size, normalize, data)
    network = load_network(model, weights, device, seed)
    seen = seen.of_model(network)
    samples = draw_samples(data, split or TRAINING, images, seen, seed)
    analysis = bs.analyze(
        network if packed is None else bs.load_packed(packed, network),
        samples,
        policy if packed is None else None,
        reference=None if packed is None else network,
        task=task,
        count=len(samples),
        compared=compared,
        seed=seed,
    )
    if out is not None:
        analysis.save(out)
    table = analysis.layer_table(layers)
    click.echo(f"{table.title}\n")
    print_table(table.columns, table.rows)
    click.echo(f"\n{table.note}\n{analysis.seconds:.1f} s")
    if out is not None:
        click.echo(f"analysis: {out}")
