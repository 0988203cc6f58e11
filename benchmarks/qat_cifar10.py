"""qat-cifar10: does a searched policy beat uniform bits after training? ResNet-20 on CIFAR-10, three BitOps budgets.

    python -m benchmarks.qat_cifar10 [--images 10000] [--epochs 2] [--seeds 3] [--threads 1] [--part 0/2]

Every row shares quantizer (LSQ), recipe, data order and budget. Searches see 512 images of a proxy of 4 % of the training set. `--part i/n`
does every n-th missing run, so that several processes can share the work.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

import bitscape as bs
from benchmarks.common import DATA, bits_of, dataset, do_recipe, proxy_images, test_batches
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.proxy import draw_proxy
from bitscape.data.sources import Dataset
from bitscape.policy import uniform_policy
from bitscape.searches.kl import Kl
from bitscape.searches.local import Local
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchProblem
from bitscape.searches.random_policy import Random
from bitscape.searches.uniform import Uniform
from recipes.networks import WEIGHTS, load

NAME, NETWORK = "qat-cifar10", "resnet20"
KEYS = ("method", "variant", "settings.budget", "settings.images", "epochs", "seed")
PROXY_IMAGES = 2000
SCORED = 512
METHODS = {
    ("uniform", "one width"): Uniform(),
    ("uniform", "two widths"): Uniform(mix=True),
    ("fisher", "not for training"): bs.Fisher(images=SCORED),
    ("fisher", "for training"): bs.Fisher(images=SCORED),
    ("local", ""): Local(images=SCORED),
    ("kl", ""): Kl(images=128),
    ("random", ""): Random(),
}
FIXED_PAIRS = {"w3a3": ("w2a4",), "w2a3": ("w2a3",), "w4a4": ()}
"""Uniform policies of one unequal pair (weight, activation) that fit the budget of the key."""
FIRST = (("uniform", "one width"), ("uniform", "two widths"), ("fisher", "for training"), ("fisher", "not for training"), ("random", ""))
"""What the comparison is about; the other scores follow when these have all their seeds."""


def wanted(seeds: int, images: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Every run, in an order in which a stopped benchmark already compares. The budget w2a3, 6 x MACs inside, is "2.5 bits"."""
    rest = [key for key in METHODS if key not in FIRST]
    tight = ("w3a3", "w2a3")
    plan = [(budget, key, seed) for seed in range(seeds) for budget in tight for key in (*FIRST, *_pairs(budget))]
    plan += [("w4a4", key, seed) for seed in range(seeds) for key in FIRST]
    plan += [(budget, key, seed) for seed in range(seeds) for budget in FIXED_PAIRS for key in rest]
    plan += [(budget, ("random", ""), seed) for budget in tight for seed in range(seeds, 5)]
    for budget, (method, variant), seed in plan:
        # The budget of one width leaves nothing to fill with a second.
        if variant != "two widths" or budget == "w2a3":
            settings = {"budget": budget, "images": images}
            yield {"method": method, "variant": variant, "settings": settings, "epochs": epochs, "seed": seed}


def _pairs(budget: str) -> list[tuple[str, str]]:
    return [("uniform", pair) for pair in FIXED_PAIRS[budget]]


@cache
def training_images() -> Dataset:
    """The complete training set."""
    return dataset("cifar10_train")


@cache
def tests() -> bs.Batches:
    """The complete test set."""
    return test_batches(dataset("cifar10_test"), WEIGHTS[NETWORK].normalization)


def problem(run: dict[str, Any]) -> SearchProblem:
    """The search of a run, on a proxy of 4 % of the training images drawn by the run's seed."""
    proxy = draw_proxy(training_images(), images=PROXY_IMAGES, seed=run["seed"])
    return SearchProblem.of(
        model=load(NETWORK, DATA),
        samples=proxy_images(proxy, NETWORK, SCORED, seed=run["seed"]),
        budget=f"bitops={run['settings']['budget']}",
        seed=run["seed"],
    )


def searched(method: SearchMethod, stated: SearchProblem, run: dict[str, Any]) -> bs.SearchResult:
    """Search with a method; fisher has a variant for networks that are trained afterwards."""
    if isinstance(method, bs.Fisher):
        return method.search(stated, for_training=run["variant"] == "for training")
    return method.search(stated)


def find(run: dict[str, Any], stated: SearchProblem) -> tuple[bs.Policy, float]:
    """The run's policy, and the seconds of its search."""
    if run["variant"] in FIXED_PAIRS[run["settings"]["budget"]]:
        weight, activation = (int(digit) for digit in run["variant"][1::2])
        names = list(stated.network.by_name)
        policy = uniform_policy(names, bs.LayerBits(weight, activation), stated.choices.freedom.pinned)
        return policy, 0.0
    result = searched(METHODS[run["method"], run["variant"]], stated, run)
    return result.policy, result.seconds


def trained(run: dict[str, Any], network: nn.Module, images: int) -> float:
    """Train by the one recipe; return the seconds of all steps."""
    order = torch.randperm(len(training_images()), generator=torch.Generator().manual_seed(run["seed"]))
    batches = bs.Batches(
        dataset=training_images().subset(order[:images]),
        normalization=WEIGHTS[NETWORK].normalization,
        shuffle=True,
        augment="crop-flip",
        seed=run["seed"],
        drop_last=True,
    )
    result = bs.train(
        network, batches, task="classes", optimizer=bs.Sgd(lr=0.01), epochs=run["epochs"], seed=run["seed"]
    )
    return float(result.records[-1]["train_s"])


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Search, calibrate, train, evaluate."""
    stated = problem(run)
    policy, seconds = find(run, stated)
    network = bs.quantize(load(NETWORK, DATA), policy, stated.samples.first(256), for_training=True, repair=None)
    before = bs.evaluate(network, tests()).value
    train_s = trained(run, network, run["settings"]["images"])
    return {
        **run,
        "network": NETWORK,
        "weights": WEIGHTS[NETWORK].file,
        "target": "cifar10",
        "proxy": f"cifar10:{PROXY_IMAGES}",
        "policy": bits_of(policy),
        "budget": dict(stated.choices.budget.caps),
        "cost": policy_cost(stated.network, policy),
        "step": "plain",
        "top1": bs.evaluate(network, tests()).value,
        "float_top1": WEIGHTS[NETWORK].float_top1,
        "test_images": len(tests().dataset),
        "search_s": seconds,
        "train_s": train_s,
        "clock": "wall",
        "dtype": "float32",
        "extra": {"before_training_top1": before},
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    do_recipe(__doc__, NAME, KEYS, wanted, measure)


if __name__ == "__main__":
    main()
