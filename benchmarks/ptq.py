"""ptq: networks of many kinds, quantized without training, after each step of repair.

    python -m benchmarks.ptq [--network resnet20 ...] [--threads 1]

Policies are found on 256 images without labels (all, where a network has fewer), and repaired on
the same ones. Budgets: the bytes of 5, 4 and 3 bits in every layer beside 8-bit activations, and
BitOps. Controls: the widest uniform bits, two neighboring widths, and random policies, all unpinned
like the searched ones. In rows of foreign images the scores come from images of another dataset.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import bitscape as bs
from benchmarks.common import bits_of, dataset, do_missing, networks_parser, proxy_images
from benchmarks.subjects import IMAGES, Subject, described, subject, value
from bitscape.searches.local import Local
from bitscape.searches.uniform import Uniform
from recipes.networks import WEIGHTS

NAME = "ptq"
KEYS = ("network", "method", "variant", "proxy", "settings.repair", "seed")
NETWORKS = (
    "mobilenetv2_tfslim",
    "resnet20",
    "resnet44",
    "cct4",
    "text_direction",
    "mobilenetv1_025_128",
    "squeezenet1_1",
    "text_detector",
    "yolox_nano",
)
WIDTHS = (2, 3, 4, 5, 6, 8)
BYTES = tuple(f"{bits}bit" for bits in (4, 3, 5))
BITOPS = ("w4a4", "w3a3", "w4a8", "w6a6")
METHODS: dict[str, Mapping[str, Any]] = {
    "uniform": {"method": "uniform"},
    "two widths": {"method": Uniform(mix=True)},
    "random": {"method": "random"},
    "local": {"method": Local()},
    "fisher": {"method": "fisher"},
    "fisher, refined": {"method": "fisher", "refine": 64},
}
REPAIRS = (None, "compensate", "tune", "reconstruct")
FOREIGN = {"cifar10_train": "imagenet_sample1k", "tiny_imagenet_train8k": "cifar10_test"}
"""Foreign images -> the test images of the networks that they are foreign to."""


def budget(variant: str) -> dict[str, Any]:
    """What `bs.search` is given."""
    if variant in BYTES:
        candidates = tuple(bs.LayerBits(bits, 8) for bits in WIDTHS)
        return {"budget": f"weight_bytes={variant}", "candidates": candidates}
    return {"budget": f"bitops={variant}"}


def wanted(networks: Sequence[str] = NETWORKS) -> Iterator[dict[str, Any]]:
    """Every run, those that say most first."""
    variants, controls = (*BYTES, *BITOPS), ("uniform", "two widths")
    tiers = [
        (("fisher", *controls), variants, ("own",), ("compensate",), range(1)),
        (("fisher", *controls), ("4bit", "3bit", "w4a4", "w3a3"), ("own",), ("tune", None), range(1)),
        (("fisher, refined", "local"), variants, ("own",), ("compensate",), range(1)),
        (("random",), variants, ("own",), ("compensate",), range(10)),
        (("fisher",), variants, ("foreign",), ("compensate",), range(1)),
        (("fisher", *controls), ("4bit", "3bit", "w4a4", "w3a3"), ("own",), ("reconstruct",), range(1)),
        (("fisher", *controls, "fisher, refined"), variants, ("own",), REPAIRS, range(5)),
        (("fisher",), variants, ("foreign",), ("compensate",), range(5)),
    ]
    for network in networks:
        yield run_of(network, "float", None, "own", None, 0)
    done = set()
    for methods, budgets, sources, repairs, seeds in tiers:
        for seed, network, *case in itertools.product(
            seeds, networks, budgets, methods, sources, repairs
        ):
            variant, method, images, repair = case
            key = (seed, network, *case)
            if key not in done and (images == "own" or foreign_images(network)):
                done.add(key)
                yield run_of(network, method, variant, images, repair, seed)


def run_of(
    network: str, method: str, variant: str | None, images: str, repair: str | None, seed: int
) -> dict[str, Any]:
    """One run."""
    run = {"network": network, "method": method, "variant": variant, "proxy": images}
    return {**run, "settings": {"repair": repair, "images": IMAGES}, "seed": seed}


def foreign_images(network: str) -> str | None:
    """The dataset whose images are foreign to the network, if its own kind of images has one."""
    if network not in WEIGHTS:
        return None
    target = WEIGHTS[network].target.removesuffix(".parquet")
    return next((images for images, of in FOREIGN.items() if of == target), None)


@cache
def scored(network: str, images: str, seed: int) -> Any:
    """The data of which policies are found."""
    if images == "own":
        return subject(network).calibration
    name = foreign_images(network)
    assert name is not None
    found: Tensor = proxy_images(dataset(name), network, IMAGES, seed)
    return found


@cache
def searched(network: str, method: str, variant: str, images: str, seed: int) -> tuple[Any, float]:
    """The policy, and the process seconds of its search; shared by the steps of repair."""
    about, started = subject(network), time.process_time()
    data, asked = scored(network, images, seed), {**METHODS[method], **budget(variant)}
    result = bs.search(about.model, data, task=about.task, count=IMAGES, seed=seed, **asked)
    return result.policy, time.process_time() - started


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    about: Subject = subject(run["network"])
    fields = {**run, **described(run["network"])}
    if run["method"] == "float":
        return {**fields, "value": fields["float_value"]}
    keys = ("network", "method", "variant", "proxy", "seed")
    policy, search_s = searched(*(run[key] for key in keys))
    started = time.process_time()
    network = bs.quantize(
        about.model,
        policy,
        about.calibration,
        repair=run["settings"]["repair"],
        count=IMAGES,
        seed=run["seed"],
    )
    quantize_s = time.process_time() - started
    return {
        **fields,
        "policy": bits_of(policy),
        "budget": dict(policy.provenance["budget"]),
        "cost": dict(policy.cost),
        "search_s": search_s,
        "value": value(about, network),
        "extra": {"quantize_s": quantize_s},
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = networks_parser(__doc__, NETWORKS)
    parser.add_argument("--part", default="0/1", help="every n-th run from the i-th on: i/n")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    do_missing(NAME, KEYS, wanted(options.network or NETWORKS), measure, options.part)


if __name__ == "__main__":
    main()
