"""What the commands load: networks, images, policies on networks. Imports torch when called."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.parsing import parse_normalization
from bitscape.errors import BitscapeError, prefixed
from bitscape.policy import LayerBits, Policy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bitscape.cost.latency import LatencyTable
    from bitscape.cost.layers import NetworkProfile
    from bitscape.data.batches import Batches
    from bitscape.data.samples import Samples
    from bitscape.data.sources import Dataset
    from bitscape.data.splits import Split
    from bitscape.verbs.quantize import Repair

DECODED_PER_PROXY_IMAGE = 4  # images decoded for one that is drawn: enough to balance classes
CALIBRATION_IMAGES = 256
OF_MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How images are read for a network."""

    input_size: int | None
    """Side of the square in pixels; None = as stored."""
    normalize: str | None
    """Text of --normalize."""

    @classmethod
    def checked(cls, input_size: int | None, normalize: str | None, *sources: str | None) -> "ImageSettings":
        """Take the options. Raises BitscapeError, before anything is loaded, if a source is missing or could not be normalized."""
        from bitscape.data.sources import check_source

        for source in filter(None, sources):
            check_source(source)
            if normalize != OF_MODEL:
                parse_normalization(normalize, source)
        return cls(input_size=input_size, normalize=normalize)

    def of_model(self, network: "nn.Module") -> "ImageSettings":
        """Fill in what `--normalize model` leaves to the network's own configuration; other settings stay."""
        if self.normalize != OF_MODEL:
            return self
        from bitscape.models.preprocessing import image_config

        with prefixed(f"--normalize {OF_MODEL}"):
            own = image_config(network)
        normalize = "/".join(",".join(map(str, values)) for values in (own.mean, own.std))
        return ImageSettings(input_size=self.input_size or own.size, normalize=normalize)


def load_network(model: str, weights: Path | None, device: str | None, seed: int = 0) -> "nn.Module":
    """Return the float network in eval mode on its device; `seed` decides weights that are drawn when it is built."""
    import torch

    from bitscape.models.find import find_model, load_weights
    from bitscape.models.modes import in_eval_mode

    place = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = find_model(model)
    if weights is not None:
        load_weights(network, weights)
    network.to(place)
    return in_eval_mode(network)


def pick_device(name: str | None) -> "torch.device":
    """Return the named device, else a GPU where there is one; of GPUs without a number this worker's own.

    Raises BitscapeError if the device cannot be used.
    """
    import torch

    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun: one GPU a process
    try:
        device = torch.device(wanted)
        float(torch.zeros(1, device=device))  # of "meta", nothing can be read back
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise BitscapeError(
            f"--device {wanted!r} cannot be used ({reason}); allowed are cpu and, with a GPU for each process, cuda"
        ) from None
    return device


def load_images(source: str, split: "Split", settings: ImageSettings, *, limit: int | None = None, seed: int = 0) -> "Dataset":
    """Load a data set at the network's input size."""
    from bitscape.data.sources import load_dataset

    return load_dataset(source, split=split, size=settings.input_size, limit=limit, seed=seed)


def load_batches(
    source: str, split: "Split", settings: ImageSettings, batch_size: int | None, network: "nn.Module"
) -> "Batches":
    """Load a data set as plain batches, for evaluation; of a size that fits the network for None."""
    from bitscape.data.batches import Batches
    from bitscape.engine.forward import samples_at_once

    images, normalization = load_images(source, split, settings), parse_normalization(settings.normalize, source)
    if batch_size is None:
        batch_size = samples_at_once(network, normalization.apply(images.subset(slice(0, 2)).images), 128)
    return Batches(dataset=images, normalization=normalization, batch_size=batch_size)


def draw_images(
    source: str, split: "Split", images: int | None, settings: ImageSettings, seed: int, *, usual: int = CALIBRATION_IMAGES
) -> "Dataset":
    """Draw a proxy or calibration set: so many `images`, or, where nobody said how many, `usual` ones or all that there are."""
    return _drawn(source, split, images, settings, seed, usual, further=0)[0]


def draw_samples(source: str, split: "Split", images: int | None, settings: ImageSettings, seed: int) -> "Samples":
    """Draw a proxy set as `draw_images` does; return it normalized, with its labels where it has any."""
    from bitscape.data.samples import Samples

    drawn = draw_images(source, split, images, settings, seed)
    return Samples.of(parse_normalization(settings.normalize, source).apply(drawn.images), drawn.labels)


def _drawn(
    source: str, split: "Split", images: int | None, settings: ImageSettings, seed: int, usual: int, *, further: int
) -> "tuple[Dataset, int]":
    """Draw images, and up to so many `further` ones behind them; return all, and how many come first."""
    from bitscape.data.proxy import draw_proxy

    count = usual if images is None else images
    limit = None if source == "digits" else DECODED_PER_PROXY_IMAGE * count
    dataset = load_images(source, split, settings, limit=limit, seed=seed)
    if images is None and len(dataset) < usual:
        count = len(dataset)
        click.echo(f"{source}: using all {count} images; {usual} is the default", err=True)
    return draw_proxy(dataset, images=max(count, min(count + further, len(dataset))), seed=seed), count


def normalized_images(
    source: str, images: int | None, settings: ImageSettings, seed: int, network: "nn.Module", *, usual: int = CALIBRATION_IMAGES
) -> "Tensor":
    """Draw calibration images, normalized for the network, on its device."""
    return calibration_and_held_out(source, images, settings, seed, network, usual=usual, further=0)[0]


def calibration_and_held_out(
    source: str,
    images: int | None,
    settings: ImageSettings,
    seed: int,
    network: "nn.Module",
    *,
    usual: int = CALIBRATION_IMAGES,
    further: int,
) -> "tuple[Tensor, Tensor]":
    """Draw calibration images, and up to so many `further` others; both normalized for the network, on its device."""
    from bitscape.data.splits import TRAINING
    from bitscape.engine.forward import device_of

    normalization = parse_normalization(settings.normalize, source)
    drawn, count = _drawn(source, TRAINING, images, settings, seed, usual, further=further)
    normalized = normalization.apply(drawn.images).to(device_of(network))
    return normalized[:count], normalized[count:]


def quantize_network(
    network: "nn.Module",
    policy: Policy,
    images: "Tensor",
    repair: "Repair | None",
    folder: Path | None,
    seed: int,
) -> "nn.Module":
    """Quantize with all of these images, in their order: `evaluate` and `export` of one command line get the same network."""
    import bitscape as bs
    from bitscape.data.samples import Samples

    samples, count = Samples.of(images), len(images)
    return bs.quantize(
        network, policy, samples, repair=repair, folder=folder, count=count, seed=seed
    )


def calibration_images(batches: "Batches", seed: int, images: int = CALIBRATION_IMAGES) -> "Tensor":
    """Draw up to so many training images, not augmented, normalized."""
    from bitscape.data.proxy import draw_proxy

    drawn = draw_proxy(batches.dataset, images=min(images, len(batches.dataset)), seed=seed)
    return batches.normalization.apply(drawn.images)


def with_random_corruptions(dataset: "Dataset", source: str, seed: int) -> "Dataset":
    """Each image clean or corrupted; `source` is what --data said."""
    from bitscape.data.corruptions import randomly_corrupted

    channels = dataset.images.shape[1]
    if channels != 3:
        raise BitscapeError(f"--mixed-quality needs images of three channels; --data {source!r} has {channels}")
    return randomly_corrupted(dataset, seed=seed)[0]


def measure_network(model: "nn.Module", shape: tuple[int, ...]) -> "NetworkProfile":
    """Count what each layer of the network does."""
    from bitscape.cost.layers import measure

    return measure(model, shape)


def load_latency(path: Path | None) -> "LatencyTable | None":
    """Read a latency table; one that fewer bits make no faster is told on stderr, before any time is spent on a search."""
    from bitscape.cost.latency import LatencyTable

    table = None if path is None else LatencyTable.load(path)
    if table is not None and (note := table.note()):
        click.echo(f"warning: {note}", err=True)
    return table


def network_shapes(model: "nn.Module") -> dict[str, tuple[int, ...]]:
    """Return layer name -> weight shape."""
    from bitscape.models.layers import layer_shapes

    return layer_shapes(model)


def policy_shape(policy: Policy, given: tuple[int, int, int] | None) -> tuple[int, ...]:
    """Return the shape of one image: as given, else as the policy was searched with."""
    if given is not None:
        return given
    images = policy.provenance.get("images")
    if isinstance(images, list) and len(images) == 4:
        return tuple(images[1:])
    raise BitscapeError("--input-shape is missing, and the policy does not tell it; write e.g. --input-shape 3x224x224")


def uniform_cost(network: "NetworkProfile", bits: int) -> dict[str, float]:
    """Return what the network costs with every layer at `bits`."""
    from bitscape.cost.policy_cost import policy_cost
    from bitscape.policy import uniform_policy

    return policy_cost(network, uniform_policy(network.by_name, LayerBits(bits, bits)))
