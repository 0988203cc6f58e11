"""depthwise-cifar10: does a searched policy beat uniform bits where mixed bits have room to win?

    python -m benchmarks.depthwise_cifar10 [--images 10000] [--epochs 2] [--seeds 3] [--part 0/2]

A network of inverted residuals on CIFAR-10, whose layers differ more than those of a ResNet. Two
budgets: the bytes of 2-bit weights with 8-bit activations, and the BitOps of W3A3. All but the
first layer is free. Every row shares quantizer (LSQ), repair, recipe, data order and budget;
searches see a proxy of 4 % of the training set. The float network is trained first, once, to
runs/depthwise-cifar10.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import bitscape as bs
from benchmarks.common import bits_of, dataset, do_recipe, test_batches
from bitscape.cost.budget import parse_budget
from bitscape.cost.layers import measure as profile
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.proxy import draw_proxy
from bitscape.data.samples import Samples
from bitscape.data.sources import Dataset
from bitscape.engine import Cosine
from bitscape.models.find import load_weights
from bitscape.models.layers import quantizable_layers
from bitscape.searches.choices import DEFAULT_CANDIDATES
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchProblem
from bitscape.searches.random_policy import Random
from bitscape.searches.trained_scores import TrainedScores
from bitscape.searches.uniform import Uniform
from recipes.networks.depthwise import depthwise

NAME = "depthwise-cifar10"
KEYS = ("method", "variant", "settings.budget", "settings.images", "epochs", "seed")
NORMALIZATION = bs.Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
FOLDER = Path("runs") / NAME
FLOAT_STAGES = ((4, 0.1, Cosine(warmup_epochs=0.5, final=0.5)), (2, 0.05, Cosine()))
"""Epochs, learning rate and schedule of one training after the other."""
PROXY_IMAGES = 2000
TEST_IMAGES = 5000
FIRST_LAYER = {"stem.conv": bs.LayerBits(8, 8)}
BUDGETS = {
    "bytes of W2, A8": (
        "weight_bytes=w2",
        tuple(bs.LayerBits(weight, 8) for weight in range(1, 9)),
    ),
    "BitOps of W3A3": ("bitops=w3a3", DEFAULT_CANDIDATES),
}
"""Name -> cap and candidates."""
NEIGHBOURS = {
    "bytes of W2, A8": (bs.LayerBits(1, 8), bs.LayerBits(3, 8)),
    "BitOps of W3A3": (bs.LayerBits(2, 2), bs.LayerBits(4, 4)),
}
"""Bits on either side of the uniform ones.

The layers of the most MACs get the lower ones, until the rest can have the higher.
"""
DEPTHWISE = {"bytes of W2, A8": bs.LayerBits(8, 8), "BitOps of W3A3": bs.LayerBits(4, 4)}
"""Bits of the depthwise layers by the rule that gives them more, while two widths fill the rest.

8/8 does not fit into W3A3.
"""
METHODS: dict[tuple[str, str], SearchMethod] = {
    ("uniform", "one width"): Uniform(),
    ("uniform", "neighbouring widths"): Uniform(mix=True),
    ("uniform", "depthwise wider"): Uniform(mix=True),
    ("random", ""): Random(),
    ("fisher", "not for training"): bs.Fisher(images=512),
    ("fisher", "for training"): bs.Fisher(images=512),
    ("trained-scores", "loss"): TrainedScores(epochs=2, readout="loss"),
    ("trained-scores", "fitted"): TrainedScores(epochs=2),
    ("trained-scores", "follow"): TrainedScores(epochs=2, task="follow"),
    ("trained-scores", "step-size"): TrainedScores(epochs=2, readout="step-size"),
}
"""Method and variant -> settings."""
FIRST = (
    ("uniform", "one width"),
    ("fisher", "not for training"),
    ("trained-scores", "fitted"),
    ("uniform", "depthwise wider"),
)
"""What the comparison is about, in the order in which the rows are measured."""


def wanted(seeds: int, images: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Every run, in an order in which a stopped benchmark already compares."""
    first, second = (
        [(budget, key, seed) for seed in range(seeds) for key in FIRST] for budget in BUDGETS
    )
    random = [(next(iter(BUDGETS)), ("random", ""), seed) for seed in range(2)]
    rest = [(budget, key, seed) for key in METHODS for budget in BUDGETS for seed in range(seeds)]
    plan = [*first, *random, *second, *rest]
    for budget, (method, variant), seed in dict.fromkeys(plan):
        settings = {"budget": budget, "images": images}
        yield {
            "method": method,
            "variant": variant,
            "settings": settings,
            "epochs": epochs,
            "seed": seed,
        }


@cache
def training_images() -> Dataset:
    """The complete training set."""
    return dataset("cifar10_train")


@cache
def tests() -> bs.Batches:
    """The first half of the test set, which is in random order."""
    return test_batches(dataset("cifar10_test").subset(torch.arange(TEST_IMAGES)), NORMALIZATION)


def batches(images: Dataset, seed: int = 0) -> bs.Batches:
    """Shuffled, cropped and flipped."""
    return bs.Batches(
        dataset=images,
        normalization=NORMALIZATION,
        shuffle=True,
        augment="crop-flip",
        seed=seed,
        drop_last=True,
    )


@cache
def float_network() -> nn.Module:
    """The float network, trained once into FOLDER; a training that was stopped goes on."""
    file = FOLDER / "float.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = depthwise()
    if not file.is_file():
        for at, (epochs, rate, schedule) in enumerate(FLOAT_STAGES):
            bs.train(
                network,
                batches(training_images(), seed=at),
                task="classes",
                optimizer=bs.Sgd(lr=rate),
                schedule=schedule,
                epochs=epochs,
                channels_last=True,
                folder=FOLDER / f"float{at}",
            )
        save_file(network.state_dict(), file)
    load_weights(network, file)
    return network.eval()


@cache
def float_top1() -> float:
    """Of the float network, in percent."""
    return float(bs.evaluate(float_network(), tests()).value)


def problem(run: dict[str, Any]) -> SearchProblem:
    """The search of a run, on a proxy of 4 % of the training images drawn by the run's seed."""
    proxy = draw_proxy(training_images(), images=PROXY_IMAGES, seed=run["seed"])
    cap, candidates = BUDGETS[run["settings"]["budget"]]
    budget, rule = run["settings"]["budget"], run["variant"]
    pins = dict.fromkeys(depthwise_layers(), DEPTHWISE[budget]) if rule == "depthwise wider" else {}
    return SearchProblem.of(
        model=float_network(),
        samples=Samples.of(NORMALIZATION.apply(proxy.images), proxy.labels),
        # The cap is that of uniform bits, whatever a rule pins.
        budget=parse_budget(cap, profile(float_network(), (3, 32, 32)), FIRST_LAYER),
        candidates=NEIGHBOURS[budget] if rule == "neighbouring widths" else candidates,
        pinned=FIRST_LAYER | pins,
        seed=run["seed"],
    )


def depthwise_layers() -> list[str]:
    """Names of the layers with one filter a channel."""
    layers = quantizable_layers(float_network())
    return [name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1]


def find(run: dict[str, Any], stated: SearchProblem) -> bs.SearchResult:
    """Search by the run's method; fisher has a variant for networks that are trained afterwards."""
    method = METHODS[run["method"], run["variant"]]
    if isinstance(method, bs.Fisher):
        return method.search(stated, for_training=run["variant"] == "for training")
    if isinstance(method, TrainedScores):  # the readouts share one training
        return method.search(
            stated, folder=FOLDER / f"{method.task} {run['settings']['budget']} {run['seed']}"
        )
    return method.search(stated)


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Search, repair, train, evaluate."""
    stated = problem(run)
    result = find(run, stated)
    network = bs.quantize(
        float_network(), result.policy, stated.samples.first(256), for_training=True
    )
    repaired = bs.evaluate(network, tests()).value
    order = torch.randperm(
        len(training_images()), generator=torch.Generator().manual_seed(run["seed"])
    )
    trained = bs.train(
        network,
        batches(training_images().subset(order[: run["settings"]["images"]]), run["seed"]),
        task="classes",
        optimizer=bs.Sgd(lr=0.01, quantizer_lr=0.001),
        epochs=run["epochs"],
        channels_last=True,
        seed=run["seed"],
    )
    return {
        **run,
        "network": "depthwise",
        "weights": f"own, {sum(epochs for epochs, _, _ in FLOAT_STAGES)} epochs",
        "target": "cifar10",
        "proxy": f"cifar10:{PROXY_IMAGES}",
        "policy": bits_of(result.policy),
        "budget": dict(stated.choices.budget.caps),
        "cost": policy_cost(stated.network, result.policy),
        "step": "plain",
        "top1": bs.evaluate(network, tests()).value,
        "float_top1": float_top1(),
        "test_images": TEST_IMAGES,
        "search_s": result.seconds,
        "train_s": float(trained.records[-1]["train_s"]),
        "clock": "wall",
        "dtype": "float32",
        "extra": {"before_training_top1": repaired},
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    do_recipe(__doc__, NAME, KEYS, wanted, measure)


if __name__ == "__main__":
    main()
