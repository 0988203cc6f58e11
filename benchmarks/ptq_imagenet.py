"""ptq-imagenet: bits found on a proxy, never trained, on MobileNetV2 and SqueezeNet 1.1.

    python -m benchmarks.ptq_imagenet [--threads 1] [--network mobilenetv2_tfslim] [--activation-bits 8]

Weights mixed, activations at one width, budget = bytes of uniform 4-bit weights. Scores, ranges and repair all come from the same
256 proxy images: CIFAR-10, Tiny-ImageNet, or the target's own; in the rows "policy only", scores alone do. Accuracy is on the 744
images of imagenet_sample1k that no method sees, before and after repair (compensated rounding, bias correction); the controls use
the target's own images.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import DATA, RESULTS, bits_of, both_ends, dataset, proxy_images, record, test_batches
from bitscape.data.sources import Dataset
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.repair import repair
from bitscape.report.records import missing, read_runs
from bitscape.searches.kl import Kl
from bitscape.searches.local import Local
from bitscape.searches.random_policy import Random
from bitscape.searches.uniform import Uniform
from recipes.networks import WEIGHTS, load

NAME = "ptq-imagenet"
KEYS = ("network", "method", "variant", "proxy", "seed", "settings.activation_bits")
POLICY_ONLY = "policy only"
"""Variant: the proxy gives the policy, the target's own images ranges and repair."""
IMAGES = 256
PROXIES = {"cifar10:256": "cifar10_train", "tiny_imagenet:256": "tiny_imagenet_train8k"}
METHODS = {"fisher": bs.Fisher(), "local": Local(), "kl": Kl(images=32), "uniform": Uniform(), "random": Random()}


def wanted(networks: list[str], widths: list[int]) -> Iterator[dict[str, Any]]:
    """Every run of the benchmark, random policies last; `proxy` null means the target's own images."""
    cases = [{"network": network, "settings": {"activation_bits": width}} for width, network in itertools.product(widths, networks)]
    own = [(method, None, None) for method in ("float", "fisher", "uniform", "local")]
    foreign = [("fisher", variant, proxy) for proxy in PROXIES for variant in (None, POLICY_ONLY)]
    later = [("kl", None, None), *(("uniform", None, proxy) for proxy in PROXIES)]
    for case, (method, variant, proxy) in [*itertools.product(cases, own + foreign), *itertools.product(cases, later)]:
        yield {**case, "method": method, "variant": variant, "proxy": proxy, "seed": 0}
    for case, seed in itertools.product(cases, range(20)):
        yield {**case, "method": "random", "variant": None, "proxy": None, "seed": seed}


@cache
def float_network(network: str) -> nn.Module:
    """The trained network."""
    return load(network, DATA).to(memory_format=torch.channels_last)


@cache
def split(network: str) -> tuple[Dataset, Dataset]:
    """The target's own proxy images, and the test images that no method sees."""
    sample = dataset("imagenet_sample1k").cropped(WEIGHTS[network].input_size)
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
    return sample.subset(order[:IMAGES]), sample.subset(order[IMAGES:])


@cache
def images(network: str, proxy: str | None) -> Tensor:
    """Proxy images (256, 3, h, w), normalized."""
    if proxy is None:
        return WEIGHTS[network].normalization.apply(split(network)[0].images)
    return proxy_images(dataset(PROXIES[proxy]), network, IMAGES, seed=0)


def top1(network: str, model: nn.Module) -> float:
    """Percent correct on the test images."""
    batches = test_batches(split(network)[1], WEIGHTS[network].normalization, batch_size=32)
    return bs.evaluate(model, batches, task="classes").value


def search(run: dict[str, Any]) -> bs.SearchResult:
    """Find the run's policy."""
    width = run["settings"]["activation_bits"]
    model, proxy = float_network(run["network"]), images(run["network"], run["proxy"])
    return bs.search(
        model,
        proxy,
        "weight_bytes=w4",
        method=METHODS[run["method"]],
        count=IMAGES,
        candidates=tuple(bs.LayerBits(bits, width) for bits in (2, 3, 4, 5, 6, 8)),
        pinned=both_ends(model, proxy),
        seed=run["seed"],
    )


def accuracies(run: dict[str, Any], policy: bs.Policy) -> dict[str, Any]:
    """Top-1 before and after repair, and the seconds that repair took."""
    network, proxy = run["network"], None if run["variant"] == POLICY_ONLY else run["proxy"]
    quantized = calibrate(with_quantizers(float_network(network), policy), images(network, proxy))
    # Of the twenty random policies only the repaired accuracy, which the comparison is about.
    plain = None if run["method"] == "random" else top1(network, quantized)
    started = time.perf_counter()
    repair(quantized, float_network(network), images(network, proxy))
    return {"plain_top1": plain, "repair_s": time.perf_counter() - started, "top1": top1(network, quantized)}


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    network = run["network"]
    shared = {**run, "weights": WEIGHTS[network].file, "target": "imagenet_sample1k", "test_images": len(split(network)[1])}
    if run["method"] == "float":
        return {**shared, "top1": top1(network, float_network(network))}
    result = search(run)
    found = accuracies(run, result.policy)
    return {
        **shared,
        "policy": bits_of(result.policy),
        "budget": dict(result.policy.provenance["budget"]),
        "cost": dict(result.policy.cost),
        "search_s": result.seconds,
        "clock": "wall",
        "top1": found.pop("top1"),
        "extra": {**found, "repairs": result.scores.repairs if result.scores else None},
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--network", action="append", choices=["mobilenetv2_tfslim", "squeezenet1_1"])
    parser.add_argument("--activation-bits", type=int, action="append")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = list(wanted(options.network or ["mobilenetv2_tfslim", "squeezenet1_1"], options.activation_bits or [8, 6]))
    for run in missing(read_runs(RESULTS / f"{NAME}.jsonl"), runs, KEYS):
        record(NAME, measure(dict(run)))


if __name__ == "__main__":
    main()
