"""seam-margins: how far apart a network holds its classes: in float, at uniform, random and searched bits, before and after training.

    python -m benchmarks.seam_margins [--images 10000] [--epochs 2] [--seeds 3] [--threads 1] [--part 0/2]

ResNet-20, "2.5 bits". The margin of an image is its distance to the nearest other class's center minus that to its own, on unit features
entering the classifier, centers over the same images; rows hold means over images of the target's test set, and of two proxies. Policies
come from transfer-policies where it has them for the same settings, otherwise they are searched. `--part i/n` does every n-th missing run.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks import transfer_policies
from benchmarks.common import DATA, RESULTS, bits_of, do_missing, seeds_parser
from benchmarks.transfer_policies import CALIBRATION, CASES, METHODS, images_of, problem, proxy_of, trained
from bitscape.data.proxy import draw_proxy
from bitscape.report.records import identity, read_runs
from bitscape.searches.seam import network_margins
from recipes.networks import WEIGHTS, load

NAME, NETWORK, HEAD = "seam-margins", "resnet20", "linear"
KEYS = ("network", "method", "variant", "proxy", "settings.budget", "settings.images", "epochs", "seed")
OWN = "cifar10:2000"
COMPARED = (
    ("uniform", "two widths", None),
    ("random", "", None),
    ("fisher", "for training", OWN),
    ("differentiable", "", OWN),
    ("seam", "", OWN),
)
IMAGES = 2000


def wanted(seeds: int, images: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Every run: float first, then all before training, then after it."""
    settings = {"budget": "w2a3", "images": images}
    common = {"network": NETWORK, "settings": settings}
    yield {**common, "method": "float", "variant": "", "proxy": None, "epochs": 0, "seed": 0}
    for length in (0, epochs):
        for seed in range(seeds):
            for method, variant, proxy in COMPARED:
                yield {**common, "method": method, "variant": variant, "proxy": proxy, "epochs": length, "seed": seed}


@cache
def looked_at() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> normalized images and labels on which margins are taken."""
    case, normalization = CASES[NETWORK], WEIGHTS[NETWORK].normalization
    sets = {
        "target": draw_proxy(images_of(case.test), images=IMAGES, seed=0),
        OWN: proxy_of(NETWORK, OWN, 0),
        "cifar100:2000": proxy_of(NETWORK, "cifar100:2000", 0),
    }
    return {name: (normalization.apply(data.images), data.labels) for name, data in sets.items() if data.labels is not None}


def policy_of(run: dict[str, Any], epochs: int) -> bs.Policy:
    """The run's policy: that of transfer-policies, or searched."""
    same = {**run, "epochs": epochs}
    for row in read_runs(RESULTS / f"{transfer_policies.NAME}.jsonl"):
        if identity(row, transfer_policies.KEYS) == identity(same, transfer_policies.KEYS):
            return bs.Policy({name: bs.LayerBits(*bits) for name, bits in row["policy"].items()})
    return METHODS[run["method"], run["variant"]].search(problem(run)).policy


def network_of(run: dict[str, Any], policy: bs.Policy | None) -> nn.Module:
    """The network in float, or at the policy's bits: calibrated, and trained where the run says so."""
    if policy is None:
        return load(NETWORK, DATA)
    if run["epochs"]:
        return trained(run, policy)[0]
    own = proxy_of(NETWORK, None, run["seed"]).images[:CALIBRATION]
    images = WEIGHTS[NETWORK].normalization.apply(own)
    return bs.quantize(load(NETWORK, DATA), policy, images, for_training=True, repair=None, count=len(images))


def measure(run: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Build the network and take its margins."""
    policy = None if run["method"] == "float" else policy_of(run, epochs)
    network = network_of(run, policy)
    margins = {name: network_margins(network, HEAD, *images) for name, images in looked_at().items()}
    return {
        **run,
        "weights": WEIGHTS[NETWORK].file,
        "target": CASES[NETWORK].target,
        "policy": None if policy is None else bits_of(policy),
        "step": "plain" if run["epochs"] else None,
        "dtype": "float32",
        "extra": {
            "margin": {name: float(values.mean()) for name, values in margins.items()},
            "share_below_zero": {name: float((values < 0).float().mean()) for name, values in margins.items()},
            "images": IMAGES,
        },
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    options = seeds_parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    do_missing(NAME, KEYS, wanted(options.seeds, options.images, options.epochs), lambda run: measure(run, options.epochs), options.part)


if __name__ == "__main__":
    main()
