"""Whole jobs: seconds and peak memory of searches, of quantization, of `bitscape compress`."""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bitscape as bs
from benchmarks import peer
from benchmarks.common import DATA, both_ends, dataset, input_size, proxy_images, published
from benchmarks.speed_clock import Clocks, clocked, forget_peak, resident
from benchmarks.speed_steps import four_bits
from bitscape.cli.app import run as run_command
from bitscape.cost.budget import parse_budget
from bitscape.cost.layers import LayerCost, NetworkProfile
from bitscape.searches.allocation import allocate
from bitscape.searches.choices import DEFAULT_CANDIDATES, Choices
from bitscape.searches.problem import SearchProblem
from bitscape.searches.scores import ScoreTable
from recipes.networks import WEIGHTS
from recipes.networks.blocks import BlockA
from recipes.networks.cifar import cifar_resnet

IMAGENET = bs.Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Candidates = tuple[bs.LayerBits, ...]

NETWORKS = ("resnet20", "mobilenetv2_tfslim", "vit_tiny", "resnet50")
PEER_IMAGES = 64
BASE = {"images": 64, "layers": 20, "pairs": 9, "pixels": 32}
GROWTH = {
    "images": (32, 64, 128, 256),
    "layers": (20, 38, 74, 110),
    "pairs": (4, 9, 16, 36),
    "pixels": (32, 48, 64, 96),
}
"""What grows -> its values, while the others stay as in BASE: Fisher scoring of CIFAR ResNets."""
ALLOCATION = {"layers": 60, "pairs": 25, "caps": 2, "instances": 8}


def measured_job(make: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """Seconds of what `make` returns, and its peak of resident memory above that before `make`."""
    before = resident("VmRSS")
    work = make()
    forget_peak()  # reading images is no part of the job, unless the job reads them
    clocks = clocked(work)
    return {**clocks, "peak_bytes": resident("VmHWM") - before}


def measure_job(run: dict[str, Any], _: int) -> dict[str, Any]:
    """One job on one network."""
    return measured_job(lambda: JOBS[run["variant"]](run["network"], run["settings"]["images"]))


def normalization(network: str) -> bs.Normalization:
    """What the network is trained with, or would be."""
    return WEIGHTS[network].normalization if network in WEIGHTS else IMAGENET


def job_images(network: str, images: int) -> Tensor:
    """Real images, normalized for the network."""
    if network == "resnet20":
        return proxy_images(dataset("cifar10_train"), network, images, seed=0)
    sample = dataset("imagenet_sample1k").cropped(input_size(network))
    return normalization(network).apply(sample.subset(slice(0, images)).images)


def fisher(model: nn.Module, images: Tensor, candidates: Candidates = DEFAULT_CANDIDATES) -> None:
    """From a float network and images to a policy: costs, ranges, scores, allocation."""
    pinned = both_ends(model, images)
    problem = SearchProblem.of(
        model, images, "weight_bytes=w4", candidates=candidates, pinned=pinned
    )
    bs.Fisher(images=len(images)).search(problem)


def fisher_job(network: str, images: int) -> Callable[[], Any]:
    """The search alone."""
    return partial(fisher, published(network), job_images(network, images))


def quantize_job(network: str, images: int) -> Callable[[], Any]:
    """From a policy of 4 bits to a quantized network, repaired by default."""
    model, calibration = published(network), job_images(network, images)
    return partial(bs.quantize, model, four_bits(model, calibration), calibration)


def compress_job(network: str, images: int) -> Callable[[], Any]:
    """The whole command, which reads images, searches, repairs, measures and packs."""
    size, shift = input_size(network), normalization(network)
    numbers = "/".join(",".join(map(str, each)) for each in (shift.mean, shift.std))
    source = "cifar10_test" if network == "resnet20" else "imagenet_sample1k"
    weights = ["--weights", DATA / "weights" / WEIGHTS[network].file] if network in WEIGHTS else []

    def compress() -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                *("compress", "--model", f"recipes.networks:{network}", *weights),
                *("--data", DATA / f"{source}.parquet", "--images", images),
                *("--input-size", size, "--normalize", numbers),
                *("--budget", "4bit", "--to", Path(folder) / "packed.safetensors"),
            ]
            if code := run_command([str(one) for one in arguments]):
                raise RuntimeError(f"bitscape compress ended with {code}")

    return compress


def fisher_like_mct_job(_: str, images: int) -> Callable[[], Any]:
    """Fisher search, quantization and repair at the widths of `mct_job`."""
    calibration = job_images(peer.NETWORK, images)
    method = bs.Fisher(images=images)
    return partial(peer.ours, method, peer.WIDTHS["2, 4, 8 bits"], calibration)


def mct_job(_: str, images: int) -> Callable[[], Any]:
    """MCT's search and quantization at its own widths."""
    return partial(peer.peers, peer.WIDTHS["2, 4, 8 bits"], job_images(peer.NETWORK, images))


JOBS = {
    "fisher": fisher_job,
    "quantize": quantize_job,
    "compress": compress_job,
    "fisher and quantize, 3 widths": fisher_like_mct_job,
    "mct": mct_job,
}
"""Job -> from the network's name and a count of images to the work."""


def measure_growth(run: dict[str, Any], _: int) -> dict[str, Any]:
    """Fisher scoring of a CIFAR ResNet with random weights on noise."""
    size = run["settings"]

    def make() -> Callable[[], Any]:
        torch.manual_seed(0)
        images = torch.randn(size["images"], 3, size["pixels"], size["pixels"])
        blocks = (size["layers"] - 2) // 6
        model = cifar_resnet(BlockA, blocks, linear=nn.Linear(64, 10)).eval()
        widths = (2, 3, 4, 5, 6, 8)[: isqrt(size["pairs"])]
        return partial(
            fisher, model, images, tuple(bs.LayerBits(*b) for b in product(widths, widths))
        )

    return measured_job(make)


def random_sizes(layers: int, seed: int) -> NDArray[np.float64]:
    """MACs, weight columns and inputs of layers (layers, 3), over three magnitudes."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(np.log([1e5, 1e2, 1e2]), np.log([1e8, 1e6, 1e5]), (layers, 3)))


def network_of(sizes: NDArray[Any]) -> NetworkProfile:
    """Linear layers of these MACs, weight columns and inputs (layers, 3)."""
    layers = [
        LayerCost(
            name=f"layer{at}",
            kind="Linear",
            macs=macs,
            weights=16 * columns,
            weight_shape=(16, columns),
            scales=16,
            input_elements=inputs,
            output_elements=inputs,
        )
        for at, (macs, columns, inputs) in enumerate(sizes.astype(int).tolist())
    ]
    return NetworkProfile(layers=tuple(layers), input_shape=(3, 32, 32))


def random_scores(
    names: tuple[str, ...], candidates: tuple[bs.LayerBits, ...], seed: int
) -> ScoreTable:
    """Scores that fall with bits as quantization noise does, layers over several magnitudes."""
    rng = np.random.default_rng(seed)
    weight, activation = np.exp(rng.normal(0, 2, (2, len(names), 1)))
    bits = np.array([(c.weight, c.activation) for c in candidates], dtype=float).T
    values = weight * 4.0 ** -bits[0] + activation * 4.0 ** -bits[1]
    return ScoreTable(
        names, candidates, values * np.exp(rng.normal(0, 0.1, values.shape)), "random"
    )


def allocation_clocks(seed: int) -> Clocks:
    """One instance; tightness goes round from 3 to 5 bits."""
    network, candidates = (
        network_of(random_sizes(ALLOCATION["layers"], seed)),
        tuple(bs.LayerBits(w, a) for w, a in product((2, 3, 4, 6, 8), repeat=2)),
    )
    bits = 3 + seed % 3
    budget = parse_budget([f"bitops=w{bits}a{bits}", f"weight_bytes=w{bits}"], network, {})
    scores = random_scores(tuple(network.by_name), candidates, seed)
    choices = Choices.of(network, budget, candidates=candidates, pinned={})
    return clocked(lambda: allocate(scores, choices))


def measure_allocation(*_: Any) -> dict[str, Any]:
    """Median and maximum over the instances."""
    taken = [allocation_clocks(seed) for seed in range(ALLOCATION["instances"])]
    columns = {clock: [one[clock] for one in taken] for clock in ("process_s", "wall_s")}
    return {
        **{clock: statistics.median(values) for clock, values in columns.items()},
        **{f"max_{clock}": max(values) for clock, values in columns.items()},
    }
