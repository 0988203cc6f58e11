"""packed-sizes: bytes of the packed file against the bits of the policy and against float32, on five networks.

    python -m benchmarks.packed_sizes [--threads 1] [--network resnet18]

Norms are folded where there are any. Every file is loaded again, and its network must give the outputs of the simulated one
bit for bit on 8 images; a run that does not is an error, not a row.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import RESULTS, bits_of, input_size, published, record
from bitscape.cost.layers import measure as measure_layers
from bitscape.cost.policy_cost import policy_cost
from bitscape.exporters.packed.file import save_packed
from bitscape.policy import uniform_policy
from bitscape.quant.fold import fold_norms
from bitscape.report.records import missing, read_runs
from bitscape.searches.choices import Choices
from bitscape.searches.random_policy import Random
from recipes.networks import WEIGHTS

NAME = "packed-sizes"
KEYS = ("network", "method", "variant", "seed")
NETWORKS = ("resnet18", "resnet50", "mobilenetv2_tfslim", "squeezenet1_1", "resnet20")
POLICIES = (("uniform", "w4"), ("uniform", "w8"), ("random", "bytes of w4"))
ACTIVATION_BITS = 8
LOADS = 5


def wanted(networks: tuple[str, ...] = NETWORKS) -> Iterator[dict[str, Any]]:
    """Every run of the benchmark."""
    for network, (method, variant) in itertools.product(networks, POLICIES):
        yield {"network": network, "method": method, "variant": variant, "seed": 0}


@cache
def images(network: str) -> Tensor:
    """Eight images (8, 3, h, w) of normal noise: enough to set scales and to compare outputs."""
    size = input_size(network)
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))


@cache
def folded(network: str) -> nn.Module:
    """The network with its batch norms folded, if it has any."""
    model = published(network)
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return fold_norms(model, images(network)[:1]) if has_norms else model


def policy_of(run: dict[str, Any]) -> bs.Policy:
    """Uniform weight bits with first and last layer at 8, or random ones at the bytes of uniform 4 bits."""
    network = run["network"]
    layers = measure_layers(folded(network), tuple(images(network).shape[1:]))
    ends = dict.fromkeys(layers.ends, bs.LayerBits(8, 8))
    if run["method"] == "random":
        candidates = tuple(bs.LayerBits(bits, ACTIVATION_BITS) for bits in range(2, 9))
        return Random().choose(Choices.of(layers, "weight_bytes=w4", candidates=candidates, pinned=ends), run["seed"], {}).policy
    bits = bs.LayerBits(int(run["variant"].removeprefix("w")), ACTIVATION_BITS)
    return uniform_policy(layers.by_name, bits, ends)


def check_same_outputs(saved: nn.Module, loaded: nn.Module, inputs: Tensor) -> None:
    """Raise BitscapeError unless both networks give the same bits."""
    with torch.no_grad():
        before, after = saved.eval()(inputs), loaded.eval()(inputs)
    if not torch.equal(before, after):
        raise bs.BitscapeError(f"loaded network: outputs differ by up to {(before - after).abs().max()}; the packed format is broken")


def load_seconds(path: Path, model: nn.Module) -> list[float]:
    """Seconds of each of five times reading, unpacking and building, the file in the page cache."""
    seconds = []
    for _ in range(LOADS):
        started = time.perf_counter()
        bs.load_packed(path, model)
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Quantize, pack, load, compare."""
    network = run["network"]
    model, inputs, policy = folded(network), images(network), policy_of(run)
    quantized = bs.quantize(model, policy, inputs, for_training=True, repair=None)
    cost = policy_cost(measure_layers(model, tuple(inputs.shape[1:])), policy)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        info = save_packed(quantized, Path(folder) / "packed.safetensors")
        save_s = time.perf_counter() - started
        check_same_outputs(quantized, bs.load_packed(info.path, model), inputs)
        seconds = load_seconds(info.path, model)
    float_bytes = sum(tensor.nbytes for tensor in published(network).state_dict().values())
    return {
        **run,
        "weights": WEIGHTS[network].file if network in WEIGHTS else "random, seed 0",
        "policy": bits_of(policy),
        "cost": cost,
        "clock": "wall",
        "extra": {
            "file_bytes": info.file_bytes,
            "other_bytes": info.other_bytes,
            "header_bytes": info.file_bytes - info.weight_bytes - info.other_bytes,
            "float32_bytes": float_bytes,
            "file_to_policy": info.file_bytes / cost["weight_bytes"],
            "float32_to_file": float_bytes / info.file_bytes,
            "save_s": save_s,
            "load_s": statistics.median(seconds),
            "load_runs_s": seconds,
        },
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = wanted(tuple(options.network or NETWORKS))
    for run in missing(read_runs(RESULTS / f"{NAME}.jsonl"), runs, KEYS):
        record(NAME, measure(dict(run)))


if __name__ == "__main__":
    main()
