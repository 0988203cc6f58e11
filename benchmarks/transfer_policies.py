"""transfer-policies: bits found on a proxy, networks trained on the target at these bits. ResNet-20 on CIFAR-10, and on CIFAR-100.

    python -m benchmarks.transfer_policies [--images 10000] [--epochs 2] [--seeds 3] [--threads 1] [--network resnet20_kc] [--part 0/2]

Every row shares quantizer (LSQ), candidates, training recipe, data order and budget. Searches that train make the same number of
epochs over their proxy, whatever its size, so that a proxy of 4 % costs a twenty-fifth of the whole target. `--part i/n` does every
n-th missing run, so that several processes can share the work.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

import bitscape as bs
from benchmarks.common import DATA, bits_of, dataset, do_missing, seeds_parser, test_batches
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.proxy import draw_proxy
from bitscape.data.samples import Samples
from bitscape.data.sources import Dataset
from bitscape.engine import Step, StepSettings, evaluate
from bitscape.quant.quantizers import Lsq, Quantizer
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.local import Local
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchProblem
from bitscape.searches.random_policy import Random
from bitscape.searches.uniform import Uniform
from recipes.networks import WEIGHTS, load

NAME = "transfer-policies"
KEYS = ("network", "method", "variant", "proxy", "settings.budget", "settings.images", "epochs", "seed")
WIDTHS = (2, 3, 4, 5, 6)
CANDIDATES = tuple(bs.LayerBits(weight, activation) for weight, activation in product(WIDTHS, WIDTHS))
SEARCH_EPOCHS = 3
SCORED_IMAGES = 512
CALIBRATION = 256
METHODS: dict[tuple[str, str], SearchMethod] = {
    ("uniform", "one width"): Uniform(),
    ("uniform", "two widths"): Uniform(mix=True),
    ("random", ""): Random(),
    ("local", ""): Local(images=SCORED_IMAGES),
    ("fisher", ""): bs.Fisher(images=SCORED_IMAGES),
    ("fisher", "for training"): bs.Fisher(images=SCORED_IMAGES),
    ("differentiable", ""): Differentiable(epochs=SEARCH_EPOCHS),
    ("differentiable", "follow"): Differentiable(epochs=SEARCH_EPOCHS, task="follow"),
    ("seam", ""): bs.Seam(epochs=SEARCH_EPOCHS),
    ("asga", ""): bs.Asga(epochs=SEARCH_EPOCHS),
}
CONTROLS, SCORED, TRAINED = ("uniform", "random"), ("local", "fisher"), ("differentiable", "seam", "asga")
PLAIN = tuple((name, "") for name in TRAINED)
FOLLOW = ("differentiable", "follow")
"""Learns the float network's outputs, where the others learn foreign labels by a new classifier."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A target, and what stands in for it in the search."""

    target: str
    training: str
    test: str
    own: tuple[int, ...]
    """Images drawn from the target's own training set: 4 % of it first."""
    foreign: dict[str, str]
    """Name of a foreign proxy -> its file; 2,000 images are drawn."""


CASES = {
    "resnet20": Case(
        target="cifar10",
        training="cifar10_train",
        test="cifar10_test",
        own=(2000, 500, 5000),
        foreign={"cifar100:2000": "cifar100_train15k", "tiny_imagenet:2000": "tiny_imagenet_train8k"},
    ),
    "resnet20_kc": Case(
        target="cifar100",
        training="cifar100_train15k",
        test="cifar100_test5k",
        own=(2000,),
        foreign={"cifar10:2000": "cifar10_train"},
    ),
}


def wanted(seeds: int, images: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Every run, in an order in which a stopped benchmark already compares. Budget w2a3, 6 x MACs inside, is "2.5 bits"."""
    first, other = CASES
    trained, scored, controls = ([key for key in METHODS if key[0] in names] for names in (TRAINED, SCORED, CONTROLS))
    compared = [*PLAIN, ("fisher", "for training")]
    main = [*(("cifar10:2000", key) for key in compared), *(("cifar100:2000", key) for key in [*compared, FOLLOW])]
    main += [(None, key) for key in controls]
    whole = [("cifar10", key) for key in PLAIN]
    plan = [(first, "w2a3", proxy, key, 0) for proxy, key in [*main, *whole[:1]]]
    plan += [(first, "w2a3", proxy, key, seed) for seed in range(1, seeds) for proxy, key in main]
    plan += [(first, "w2a3", proxy, key, 0) for proxy, key in whole[:2]]
    plan += [(first, "w3a3", proxy, key, seed) for seed in range(seeds) for proxy, key in main]
    plan += [(first, "w2a3", proxy, key, 0) for proxy, key in whole]
    plan += [(first, "w2a3", "tiny_imagenet:2000", key, seed) for seed in range(seeds) for key in compared]
    plan += [(other, "w2a3", None, key, 0) for key in controls]
    best_known = [(None, ("uniform", "two widths")), *(("cifar100:2000", key) for key in compared)]
    plan += [(other, "w2a3", proxy, key, seed) for seed in range(1, seeds) for proxy, key in best_known]
    for keys in (compared, [*trained, *scored]):
        plan += [(other, "w2a3", proxy, key, 0) for proxy in ("cifar10:2000", "cifar100:2000") for key in keys]
    proxies = ["cifar10:2000", "cifar10:500", "cifar10:5000", *CASES[first].foreign]
    every = product(range(seeds), ("w2a3", "w3a3"), proxies, [*trained, *scored])
    plan += [(first, budget, proxy, key, seed) for seed, budget, proxy, key in every]
    plan += [(first, budget, proxy, key, seed) for seed in range(seeds) for budget in ("w2a3", "w3a3") for proxy, key in whole]
    plan += [(first, budget, None, ("random", ""), seed) for budget in ("w2a3", "w3a3") for seed in range(seeds, 5)]
    for network, budget, proxy, (method, variant), seed in dict.fromkeys(plan):
        if variant == "two widths" and budget == "w3a3":  # one width fills this budget
            continue
        settings = {"budget": budget, "images": images}
        run = {"network": network, "method": method, "variant": variant, "proxy": proxy}
        yield {**run, "settings": settings, "epochs": epochs, "seed": seed}


@cache
def images_of(file: str) -> Dataset:
    """A data set, at 32 pixels."""
    return dataset(file, None if file.startswith("cifar") else 32)


@cache
def tests(network: str) -> bs.Batches:
    """The complete test set."""
    return test_batches(images_of(CASES[network].test), WEIGHTS[network].normalization)


def proxy_of(network: str, proxy: str | None, seed: int) -> Dataset:
    """The images that a search sees, drawn by the seed; without a proxy the target's own, for calibration."""
    case = CASES[network]
    name, _, count = (proxy or f"{case.target}:{SCORED_IMAGES}").partition(":")
    source = images_of(case.training if name == case.target else case.foreign[f"{name}:{count}"])
    return draw_proxy(source, images=int(count), seed=seed) if count else source


def problem(run: dict[str, Any]) -> SearchProblem:
    """The search of a run."""
    drawn = proxy_of(run["network"], run["proxy"], run["seed"])
    return SearchProblem.of(
        model=load(run["network"], DATA),
        samples=Samples.of(WEIGHTS[run["network"]].normalization.apply(drawn.images), drawn.labels),
        budget=f"bitops={run['settings']['budget']}",
        candidates=CANDIDATES,
        seed=run["seed"],
    )


def trained(
    run: dict[str, Any], policy: bs.Policy, step: Step | StepSettings | None = None, quantizer: Quantizer | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize, calibrate on the target, train by the one recipe; plainly and by LSQ if nothing else is given."""
    entry, seed, images = WEIGHTS[run["network"]], run["seed"], images_of(CASES[run["network"]].training)
    own = proxy_of(run["network"], None, seed)
    images = entry.normalization.apply(own.images[:CALIBRATION])
    settings: dict[str, Any] = {"for_training": True, "repair": None, "quantizer": quantizer or Lsq(), "count": CALIBRATION}
    network = bs.quantize(load(run["network"], DATA), policy, images, **settings)
    before = evaluate(network, tests(run["network"]))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = bs.Batches(
        dataset=images.subset(order[: run["settings"]["images"]]),
        normalization=entry.normalization,
        shuffle=True,
        augment="crop-flip",
        seed=seed,
        drop_last=True,
    )
    start = time.process_time()
    result = bs.train(
        network, batches, task="classes", step=step, optimizer=bs.Sgd(lr=0.01), epochs=run["epochs"], seed=seed
    )
    step_s = (time.process_time() - start) / (run["epochs"] * len(batches))
    train_s = float(result.records[-1]["train_s"])
    return network, {"before_training_top1": before.top1, "train_s": train_s, "step_process_s": step_s}


def searched(method: SearchMethod, stated: SearchProblem, run: dict[str, Any]) -> bs.SearchResult:
    """Search with a method; fisher has a variant for networks that are trained afterwards."""
    if isinstance(method, bs.Fisher):
        return method.search(stated, for_training=run["variant"] == "for training")
    return method.search(stated)


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Search, train, evaluate."""
    stated = problem(run)
    result = searched(METHODS[run["method"], run["variant"]], stated, run)
    network, extra = trained(run, result.policy)
    accuracy = evaluate(network, tests(run["network"]))
    return {
        **run,
        "weights": WEIGHTS[run["network"]].file,
        "target": CASES[run["network"]].target,
        "policy": bits_of(result.policy),
        "budget": dict(stated.choices.budget.caps),
        "cost": policy_cost(stated.network, result.policy),
        "step": "plain",
        "top1": accuracy.top1,
        "float_top1": WEIGHTS[run["network"]].float_top1,
        "test_images": accuracy.images,
        "search_s": result.seconds,
        "train_s": extra.pop("train_s"),
        "clock": "wall",
        "dtype": "float32",
        "extra": {"test_loss": accuracy.loss, "search_epochs": SEARCH_EPOCHS if run["method"] in TRAINED else None, **extra},
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = seeds_parser(__doc__)
    parser.add_argument("--network", choices=list(CASES), help="the runs of one network only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = [run for run in wanted(options.seeds, options.images, options.epochs) if options.network in (None, run["network"])]
    do_missing(NAME, KEYS, plan, measure, options.part)


if __name__ == "__main__":
    main()
