"""`bitscape tiers`: a few static networks and a tiny gate, in place of bits that each image decides."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.network import DECODED_PER_PROXY_IMAGE, ImageSettings, load_folder, load_images, load_network, with_mixed_quality
from bitscape.cli.options import FOLDER, data_options, image_options, mixed_option, network_options, seed_option
from bitscape.cli.output import amount
from bitscape.cli.parsing import parse_normalization
from bitscape.cli.spending import print_tiers, shares_of
from bitscape.errors import BitscapeError

if TYPE_CHECKING:
    from torch import nn

    from bitscape.data.sources import Dataset
    from bitscape.dynamic import DynamicNetwork


@click.command()
@network_options
@click.option("--checkpoint", required=True, type=FOLDER, metavar="FOLDER", help="What `bitscape train --dynamic` left there.")
@data_options
@image_options
@click.option("--images", default=2000, show_default=True, type=click.IntRange(min=2), help="Images drawn, of the qualities to be met.")
@mixed_option
@click.option("--count", default=3, show_default=True, type=click.IntRange(2, 4), help="Tiers.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER", help="Where the tiers go.")
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
    images: int,
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
    from bitscape.dynamic.storage import TIERS_FILE, save_tiers
    from bitscape.dynamic.tiers import distill_tiers
    from bitscape.quant.convert import batches_of

    if (out / TIERS_FILE).exists():
        raise BitscapeError(f"--out {out}: it holds tiers; give another folder")
    float_network = load_network(model, weights, device, seed)
    settings = ImageSettings(input_size=input_size, normalize=normalize).of_model(float_network)
    dataset = _drawn(data, split or "train", images, settings, seed)
    if mixed_quality:
        dataset = with_mixed_quality(dataset, data, seed)
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


def _drawn(source: str, split: str, images: int, settings: ImageSettings, seed: int) -> "Dataset":
    """So many images, or all there are."""
    from bitscape.data.proxy import draw_proxy

    limit = None if source == "digits" else DECODED_PER_PROXY_IMAGE * images
    dataset = load_images(source, split, settings, limit=limit, seed=seed)
    return draw_proxy(dataset, images=min(images, len(dataset)), seed=seed)


def _dynamic(checkpoint: Path, float_network: "nn.Module", shape: tuple[int, ...]) -> "DynamicNetwork":
    from bitscape.dynamic import DynamicNetwork

    network, _ = load_folder(float_network, checkpoint, shape)
    if not isinstance(network, DynamicNetwork):
        raise BitscapeError(f"--checkpoint {checkpoint}: its bits do not depend on the image; train with --dynamic for that")
    return network
