"""`bitscape tiers`: a few static networks and a tiny gate, in place of bits that each image decides."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.network import ImageSettings, draw_images, load_network, with_random_corruptions
from bitscape.cli.options import MOST, data_options, image_options, mixed_option, network_options, seed_option
from bitscape.cli.output import amount
from bitscape.cli.parsing import parse_normalization
from bitscape.cli.paths import FOLDER, OUTPUT_FOLDER, keep_locked
from bitscape.cli.spending import print_tiers
from bitscape.errors import BitscapeError
from bitscape.folders import DYNAMIC_FILE, results_in

if TYPE_CHECKING:
    from torch import nn

    from bitscape.dynamic import DynamicNetwork


IMAGES = 2000


@click.command()
@network_options
@click.option("--checkpoint", required=True, type=FOLDER, metavar="FOLDER", help="What `bitscape train --dynamic` left there.")
@data_options
@image_options
@click.option("--images", type=click.IntRange(2, MOST), help=f"Images drawn, of the qualities to be met.  [default: {IMAGES}]")
@mixed_option
@click.option("--count", default=3, show_default=True, type=click.IntRange(2, 4), help="Tiers.")
@click.option("--out", required=True, type=OUTPUT_FOLDER, metavar="FOLDER", help="Where the tiers go.")
@seed_option
def tiers(
    model: str,
    weights: Path | None,
    device: str | None,
    checkpoint: Path,
    data: str,
    split: str | None,
    input_size: int | None,
    normalize: str | None,
    images: int | None,
    mixed_quality: bool,
    count: int,
    out: Path,
    seed: int,
) -> None:
    """Turn a dynamic network into a few static ones, and a gate that picks one for each image.

    Each tier is a folder as `bitscape train --policy` leaves it, so it evaluates and packs alone, too.

    \b
    Example:
      bitscape tiers --model timm:resnet18 --checkpoint run1 --data train/ \\
        --input-size 224 --normalize imagenet --mixed-quality --out tiers1
    """
    from bitscape.cost.policy_cost import bitops
    from bitscape.data.splits import TRAINING
    from bitscape.dynamic.storage import save_tiers
    from bitscape.dynamic.tiers import distill_tiers, shares_of
    from bitscape.quant.convert import batches_of

    if held := results_in(out):
        raise BitscapeError(f"--out {out}: it holds {', '.join(held)}; give another folder")
    _check_dynamic(checkpoint)
    settings = ImageSettings.checked(input_size, normalize, data)
    keep_locked(out)
    float_network = load_network(model, weights, device, seed)
    settings = settings.of_model(float_network)
    dataset = draw_images(data, split or TRAINING, images, settings, seed, usual=IMAGES)
    if mixed_quality:
        dataset = with_random_corruptions(dataset, data, seed)
    normalized = parse_normalization(settings.normalize, data).apply(dataset.images)
    network = _dynamic(checkpoint, float_network, tuple(dataset.images.shape[1:]))
    made = distill_tiers(network, normalized, count)
    shares = shares_of([made.gate(batch) for batch in batches_of(normalized, made)], len(made.policies))
    save_tiers(made, out, shares=shares)
    print_tiers(made.policies, network.cost, shares)
    mean = made.gate_bitops + sum(share * bitops(network.cost, policy) for share, policy in zip(shares, made.policies, strict=True))
    click.echo(f"\n{len(dataset):,} images cost {amount(mean)} BitOps on average, {100 * made.gate_bitops / mean:.2f} % of it for the gate")
    click.echo(
        f"{out}; next: bitscape evaluate --checkpoint {out} ..., or one of them: bitscape export packed --checkpoint {out}/tier1 ..."
    )


def _check_dynamic(checkpoint: Path) -> None:
    from bitscape.dynamic.storage import folder_policy

    folder_policy(checkpoint)  # says which folders no network can be loaded from
    if not (checkpoint / DYNAMIC_FILE).is_file():
        raise BitscapeError(f"--checkpoint {checkpoint}: its bits do not depend on the image; train with --dynamic for that")


def _dynamic(checkpoint: Path, float_network: "nn.Module", shape: tuple[int, ...]) -> "DynamicNetwork":
    from bitscape.dynamic import DynamicNetwork
    from bitscape.dynamic.storage import load_folder

    network, _ = load_folder(float_network, checkpoint, shape)
    assert isinstance(network, DynamicNetwork)
    return network
