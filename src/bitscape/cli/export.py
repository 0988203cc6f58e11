"""`bitscape export`: a quantized network as a file."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.evaluate import calibration_options
from bitscape.cli.network import ImageSettings, calibrated, load_network, load_trained, normalized_images
from bitscape.cli.options import FILE, FOLDER, image_options, network_options, seed_option
from bitscape.cli.output import amount, print_table
from bitscape.cli.packed import check_same_outputs, load_packed_network, save_packed_network
from bitscape.cli.parsing import writable
from bitscape.errors import BitscapeError
from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import nn

    from bitscape.export.packed import PackedInfo


@click.group(invoke_without_command=True)
@click.pass_context
def export(context: click.Context) -> None:
    """Write a quantized network as a file."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@export.command()
@network_options
@image_options
@click.option("--policy", "policy_file", type=FILE, metavar="FILE", help="Quantize by this policy; needs --calibration.")
@calibration_options
@click.option("--checkpoint", type=FOLDER, metavar="FOLDER", help="Instead: what `bitscape train --policy` left there.")
@click.option("--out", required=True, callback=writable, metavar="FILE", help="Where the file goes, .safetensors.")
@seed_option
def packed(
    model: str,
    weights: Path | None,
    device: str | None,
    input_size: int | None,
    normalize: str | None,
    policy_file: Path | None,
    calibration: str | None,
    calibration_images: int,
    repair: bool,
    checkpoint: Path | None,
    out: Path,
    seed: int,
) -> None:
    """Write bit-packed weights and everything else the network needs, as one safetensors file.

    \b
    Example:
      bitscape export packed --model timm:resnet18 --weights resnet18.safetensors \\
        --policy policy.json --calibration train/ --input-size 224 \\
        --normalize imagenet --out resnet18-packed.safetensors
    """
    if (policy_file is None) == (checkpoint is None):
        raise BitscapeError("give --policy with --calibration, or --checkpoint; exactly one of the two")
    if (policy_file is None) != (calibration is None):
        raise BitscapeError("--policy and --calibration go together: images set the policy's activation scales")
    network = load_network(model, weights, device, seed)
    if checkpoint is not None:
        quantized, policy = load_trained(network, checkpoint)
        if policy is None:
            raise BitscapeError(f"{checkpoint} holds a float network; train with --policy, or give --policy here")
        info = save_packed_network(quantized, out, policy, folded=False)
    else:
        assert policy_file is not None and calibration is not None
        policy = Policy.load(policy_file)
        settings = ImageSettings(input_size=input_size, normalize=normalize)
        images = normalized_images(calibration, calibration_images, settings, seed, network)
        quantized = calibrated(network, policy, images, repair=repair)
        info = save_packed_network(quantized, out, policy, folded=repair)
        check_same_outputs(quantized, load_packed_network(out, network, tuple(images.shape[1:]))[0], images, out)
    report_bytes(info, network, policy)


def report_bytes(info: "PackedInfo", network: "nn.Module", policy: Policy) -> None:
    """Print the bytes of a packed file, beside what the policy's bits say and beside float32."""
    from bitscape.cli.network import network_shapes

    shapes = network_shapes(network)
    sizes = {name: policy.layers[name].weight * math.prod(shape) for name, shape in shapes.items()}
    scales = 4 * sum(shape[0] for shape in shapes.values())
    values = sum(t.nbytes for t in network.state_dict().values())
    header = info.file_bytes - info.weight_bytes - info.other_bytes
    rows = [
        ["weights, as the policy's bits", sum(sizes.values()) // 8],
        ["weights and scales, in the file", info.weight_bytes],
        ["  of it scales", scales],
        ["biases, norms, activation scales", info.other_bytes],
        ["header", header],
        ["file", info.file_bytes],
        ["float32 tensors", values],
    ]
    print_table(["bytes", ""], [[name, f"{count:,}"] for name, count in rows])
    click.echo(f"{info.path}: {amount(info.file_bytes, 'B')}, {values / info.file_bytes:.2f} times smaller than float32")
