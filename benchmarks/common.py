"""What the benchmark scripts share: where data lies, images ready for a network, and how a run is written down."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitscape as bs
from bitscape.cost.layers import measure
from bitscape.data.proxy import draw_proxy
from bitscape.data.sources import Dataset
from bitscape.report.records import append_run, missing, read_runs
from recipes.networks import WEIGHTS, load, resnet18, resnet50, vit_tiny

RESULTS = Path(__file__).parent / "results"
Run = Mapping[str, Any]
DATA = Path(os.environ.get("BITSCAPE_DATA", Path(__file__).parents[2] / "shared" / "data"))

WITHOUT_WEIGHTS = {"resnet18": resnet18, "resnet50": resnet50, "vit_tiny": vit_tiny}


def published(network: str) -> nn.Module:
    """The network as it is handed out, in eval mode, with trained weights or seeded random ones."""
    if network not in WITHOUT_WEIGHTS:
        return load(network, DATA)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WITHOUT_WEIGHTS[network]().eval()


def input_size(network: str) -> int:
    """Side of the network's square input image in pixels."""
    return WEIGHTS[network].input_size if network in WEIGHTS else 224


def dataset(name: str, size: int | None = None) -> Dataset:
    """A parquet file of the data folder, such as "cifar10_train", in memory."""
    return bs.load_dataset(str(DATA / f"{name}.parquet"), size=size)


def proxy_images(source: Dataset, network: str, images: int, seed: int) -> Tensor:
    """Class-balanced proxy images (n, c, h, w), resized to the network's input and normalized for it."""
    entry = WEIGHTS[network]
    drawn = draw_proxy(source, images=images, seed=seed)
    if drawn.images.shape[-1] != entry.input_size:
        drawn = drawn.resized(entry.input_size)
    return entry.normalization.apply(drawn.images)


def test_batches(data: Dataset, normalization: bs.Normalization, batch_size: int = 250) -> bs.Batches:
    """Batches in order, without augmentation."""
    return bs.Batches(dataset=data, normalization=normalization, batch_size=batch_size)


def both_ends(model: nn.Module, images: Tensor) -> dict[str, str]:
    """First layer and heads at 8/8: the pins of recorded rows whose budget caps bytes alone."""
    return dict.fromkeys(measure(model, tuple(images.shape[1:])).ends, "8/8")


def bits_of(policy: bs.Policy) -> dict[str, list[int]]:
    """Layer -> [weight bits, activation bits]: how a run record holds a policy."""
    return {name: [bits.weight, bits.activation] for name, bits in policy.layers.items()}


def recipe_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark that trains networks by the one short recipe."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="training images an epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def seeds_parser(description: str | None) -> argparse.ArgumentParser:
    """Those, for benchmarks that repeat their runs by seed."""
    parser = recipe_parser(description)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="i/n: do every n-th run, from the i-th")
    return parser


def do_recipe(
    description: str | None,
    benchmark: str,
    keys: Sequence[str],
    wanted: Callable[[int, int, int], Iterable[Run]],
    measure: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> None:
    """Read the options of `seeds_parser`; do the missing of the runs wanted of so many seeds, images, epochs."""
    options = seeds_parser(description).parse_args()
    torch.set_num_threads(options.threads)
    runs = wanted(options.seeds, options.images, options.epochs)
    do_missing(benchmark, keys, runs, measure, options.part)


def networks_parser(description: str | None, networks: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every benchmark whose runs are of some networks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", action="append", choices=networks)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def do_missing(
    benchmark: str, keys: Sequence[str], runs: Iterable[Run], measure: Callable[[dict[str, Any]], Mapping[str, Any]], part: str = "0/1"
) -> None:
    """Measure and record every n-th of `runs`, from the i-th on for part "i/n", that the results file lacks when its turn comes.

    The file is read again before each run, as other processes may have added to it.
    """
    first, step = (int(text) for text in part.split("/"))
    for run in list(runs)[first::step]:
        if missing(read_runs(RESULTS / f"{benchmark}.jsonl"), [run], keys):
            record(benchmark, measure(dict(run)))


def record(benchmark: str, run: Mapping[str, Any]) -> None:
    """Append a run to the benchmark's results file, with the command that made it, and print its gist."""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    append_run(RESULTS / f"{benchmark}.jsonl", {"benchmark": benchmark, "threads": torch.get_num_threads(), "command": command, **run})
    shown = ("network", "method", "variant", "proxy", "budget", "seed", "top1", "extra")
    print({key: run[key] for key in shown if key in run}, flush=True)
