"""Options that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from bitscape.cli.network import CALIBRATION_IMAGES
from bitscape.cli.paths import FILE, MODEL, OUTPUT_FOLDER, SOURCE, OutputFile
from bitscape.cost.targets import TARGETS

Command = TypeVar("Command", bound=Callable[..., Any])
MOST = 2**31 - 1
COUNT = click.IntRange(1, MOST)
"""A number of things; larger ones overflow in the libraries below."""


def all_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Make one decorator of several options, listed in the help in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_option = click.option(
    "--model",
    required=True,
    type=MODEL,
    metavar="NAME",
    help="Network: package.module:function, file.py:function, timm:name, torchvision:name, or hf:name with its weights.",
)
network_options = all_of(
    model_option,
    click.option("--weights", type=FILE, metavar="FILE", help="Float weights, .safetensors or .pt. Default: as built."),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... Default: cuda if there is one."),
)
data_options = all_of(
    click.option(
        "--data",
        required=True,
        type=SOURCE,
        metavar="SOURCE",
        help="Images: digits, a .parquet or .npz file, a folder of images or of class folders, .tar files such as "
        "'train-{0000..0015}.tar' or a folder of them, hf:name.",
    ),
    click.option("--split", metavar="NAME", help="Split, where the source has several: train, test, ..."),
)
image_options = all_of(
    click.option(
        "--input-size",
        type=click.IntRange(1, 2**14),
        metavar="PIXELS",
        help="Resize the shorter side to this and cut out the middle square. Default: as stored.",
    ),
    click.option(
        "--normalize",
        metavar="NAME",
        help="imagenet, cifar10, unit (0..1), digits, or means/deviations: 0.5,0.5,0.5/0.2,0.2,0.2. "
        "model: as a timm: or hf: network says itself, which then also sets --input-size unless it is given.",
    ),
)
shape_option = click.option("--input-shape", metavar="CxHxW", help="Shape of one image, e.g. 3x224x224, for counting costs.")
mixed_option = click.option(
    "--mixed-quality", is_flag=True, help="Of the images five in six are corrupted: noise, blur, JPEG, brightness or contrast."
)
channels_last_option = click.option(
    "--channels-last/--no-channels-last",
    default=None,
    help="Memory format of the convolutions. Default: channels_last in search and training where the network takes it, "
    "contiguous in evaluate.",
)
seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), metavar="NUMBER", help="Seed of everything random."
)
_CAPS = (
    "Cap, repeatable: 4bit (bytes of 4-bit weights in every layer), bitops=0.25x (of 8 bit), bitops=w4a4, bitops=3.9e8, "
    "weight_bytes=1.2MB, "
    "mean_weight_bits=4, mean_activation_bits=4, peak_activation_bytes=64kB, latency_ms=2.5 (with --latency), "
    "flash_bytes=1MB, sram_bytes=256kB (with --latency of Vela)."
)
caps_option = click.option("--budget", "budgets", multiple=True, metavar="CAP", help=_CAPS)
budget_option = click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="CAP",
    help=f"{_CAPS} Or drop=0.5: the smallest policy whose top-1 on labelled images stays within 0.5 points of the float network's.",
)
latency_option = click.option(
    "--latency",
    type=FILE,
    metavar="FILE",
    help="Times measured on the target machine by `bitscape latency build`; makes latency_ms a cost and a budget.",
)
target_option = click.option(
    "--target",
    "target_name",
    type=click.Choice(list(TARGETS)),
    help="; ".join(["Offer only bits that the target stores and computes", *(f"{each.name}: {each.what}" for each in TARGETS.values())])
    + ".",
)
task_option = click.option(
    "--task",
    type=click.Choice(["auto", "classes", "dense", "binary", "follow"]),
    default="auto",
    show_default=True,
    help="What the outputs are: logits of classes, of classes at every position, yes or no, or any values to stay close to. "
    "auto: (n, 2 or more) are classes.",
)
repair_options = all_of(
    click.option(
        "--repair",
        type=click.Choice(["compensate", "adaptive", "tune", "reconstruct", "none"]),
        help="What is done about the errors of rounding: seconds (compensate), minutes, or nothing.  "
        "[default: compensate]",
    ),
    click.option(
        "--repair-folder",
        type=OUTPUT_FOLDER,
        metavar="FOLDER",
        help="Where tune and reconstruct keep their checkpoints; the same command goes on from there.",
    ),
)
policy_options = all_of(
    click.option(
        "--policy",
        "policy_file",
        type=FILE,
        metavar="FILE",
        help="Quantize by this policy; needs --calibration.",
    ),
    click.option(
        "--calibration",
        type=SOURCE,
        metavar="SOURCE",
        help="Images that set the activation scales; no labels needed.",
    ),
    click.option(
        "--calibration-images",
        type=COUNT,
        help=f"Images drawn for it.  [default: {CALIBRATION_IMAGES}]",
    ),
    repair_options,
)
samples_option = click.option(
    "--images",
    type=COUNT,
    help=f"Images drawn of --data, evenly over the classes.  [default: {CALIBRATION_IMAGES}]",
)
method_options = all_of(
    click.option(
        "--method",
        "method_name",
        default="fisher",
        show_default=True,
        help="See `bitscape methods`.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Setting of the method; repeatable.",
    ),
    click.option(
        "--candidates",
        metavar="BITS",
        help="Widths offered, in all pairs; or w=2,4,8;a=8 for weights and activations apart.  "
        "[default: 2,3,4,5,6,8, of these what --target has]",
    ),
)
policy_out_option = click.option(
    "--out", type=OutputFile(".json"), metavar="FILE", help="Where the policy goes, .json."
)
pin_option = click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="LAYER=W/A",
    help="Fix weight/activation bits by name or pattern, e.g. conv1=8/8 or 'head*=8/8'; repeatable. The first layer and the heads "
    "are at 8/8 unless pinned otherwise; under a cap on weights alone, of the heads only the activations. `--pin none` frees them.",
)
keep_float_option = click.option(
    "--keep-float",
    "keep_float",
    multiple=True,
    metavar="LAYER",
    help="Name or pattern of layers that stay float, e.g. 'head*'; repeatable.",
)
