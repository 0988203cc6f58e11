"""dqmq: do bits that follow the image's quality pay? ResNet-20 on CIFAR-10 images of mixed quality, LSQ, weights of static bits.

    python -m benchmarks.dqmq [--images 10000] [--epochs 2] [--seeds 3] [--threads 1] [--only w3a3] [--variants]

Every row is trained on the same images, clean or under one of five corruptions, by one recipe, and tested on the test set with every image
clean or under one of those five or of three others. Every row is held to the BitOps of uniform widths, on training images, and what decides
is counted. What shares the learned network (its decisions handed to other images, one decision a batch, static tiers, an oracle that knows
the severity) is measured in one run. `--variants` does other forms of the method instead, one seed each. Settings were chosen on runs of
seed 0, which is not among those here.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import DATA, RESULTS, bits_of, do_missing, recipe_parser
from benchmarks.transfer_policies import CASES, WIDTHS, images_of
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.corruptions import HELD_OUT, TRAINED, Quality, randomly_corrupted
from bitscape.data.samples import Samples
from bitscape.data.sources import Dataset
from bitscape.dynamic import (
    Dqmq,
    DqmqSgd,
    DynamicBits,
    DynamicNetwork,
    TieredNetwork,
    begin_at,
    decide,
    distill_tiers,
    dynamic_network,
    keep_bitops,
)
from bitscape.dynamic.decision import Decision, joined
from bitscape.engine import Batch, StepRecord, train
from bitscape.models.modes import evaluating
from bitscape.policy import uniform_policy
from bitscape.report.records import read_runs
from bitscape.searches.problem import SearchProblem
from bitscape.steps.plain import Plain
from recipes.networks import WEIGHTS, load

NAME = "dqmq"
KEYS = ("network", "method", "variant", "settings.budget", "settings.images", "epochs", "seed")
NETWORK = "resnet20"
BUDGETS = {"w3a3": (3, 3), "w4a4": (4, 4), "w3a2": (3, 2)}
"""Name -> bits of weights and activations of the uniform policy, whose BitOps are the limit; dynamic networks have its weights."""
LOW = {"w3a2": 1}
"""Least width of a budget that the default of 2 leaves no room in."""
UNIFORM, LONGER, LEARNED, RANDOM = ("uniform", ""), ("uniform", "twice the epochs"), ("dqmq", ""), ("random bits", "same marginal")
STATIC, ACTIVATIONS = ("static mixed", "fisher for training"), ("static mixed", "fisher for training, activations only")
MOST = 8
"""Largest width."""
CALIBRATION, KEPT, DISTILLED, ORACLE, SCORED = 256, 2000, 2000, 4000, 512
TEST_SEED, BATCH, TIERS = 1, 250, (2, 3, 4)
SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Bits that the oracle may add to every decision about images of one severity."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A form of the method."""

    bits: DynamicBits = field(default_factory=DynamicBits)
    step: dict[str, Any] = field(default_factory=dict)
    decisions: Literal["per_image", "per_batch"] = "per_image"
    """In training and in the test."""
    head_lr: float = DqmqSgd().head_lr
    begins_at_budget: bool = True


FIRST_STAGE = ("conv1", *(f"layer1.{block}.conv{at}" for block in range(3) for at in (1, 2)), "linear")
VARIANTS = {
    "": Variant(),
    "faster heads": Variant(head_lr=0.3),
    "begins at 8 bits": Variant(step={"warm_up": 0.1}, head_lr=0.3, begins_at_budget=False),
    "continuous until the last third": Variant(step={"hard_from": 2 / 3, "hard_until": 1.0}),
    "budget of every image": Variant(step={"budget_of": "image"}),
    "weights and activations": Variant(bits=DynamicBits(weights=True)),
    "score function only": Variant(step={"estimator": "score", "score_weight": 1.0}),
    "gumbel-softmax": Variant(step={"estimator": "gumbel"}),
    "1 to 8 bits": Variant(bits=DynamicBits(low=1)),
    "after the first stage": Variant(bits=DynamicBits(static=FIRST_STAGE)),
    "one decision a batch": Variant(decisions="per_batch"),
    "path-wise and score function": Variant(step={"estimator": "both"}),
}


def wanted(seeds: int, images: int, epochs: int, variants: bool) -> Iterator[dict[str, Any]]:
    """Every run, in an order in which a stopped benchmark already compares; random bits after the network whose bits they draw."""
    main = (LEARNED, UNIFORM, STATIC, RANDOM, ACTIVATIONS, LONGER)
    plan = [(budget, seed, key) for seed in range(1, 1 + seeds) for budget in BUDGETS for key in main]
    if variants:
        plan = [("w3a3", 1, (LEARNED[0], name)) for name in VARIANTS if name]
    for budget, seed, (method, variant) in plan:
        settings = {"budget": budget, "images": images}
        own = 2 * epochs if (method, variant) == LONGER else epochs
        yield {"network": NETWORK, "method": method, "variant": variant, "settings": settings, "epochs": own, "seed": seed}


@cache
def tests() -> tuple[Dataset, Quality]:
    """The test set, each image clean or under one of the seen or held-out corruptions."""
    return randomly_corrupted(images_of(CASES[NETWORK].test), seed=TEST_SEED, corruptions=(*TRAINED, *HELD_OUT))


@cache
def homogeneous() -> Dataset:
    """The test set, all images of a batch in one quality."""
    return randomly_corrupted(images_of(CASES[NETWORK].test), seed=TEST_SEED, corruptions=(*TRAINED, *HELD_OUT), together=BATCH)[0]


@cache
def training(seed: int, images: int) -> tuple[Dataset, Dataset, Quality]:
    """Training images of mixed quality, and others, held out of training, on which the oracle chooses."""
    source = images_of(CASES[NETWORK].training)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    mixed, quality = randomly_corrupted(source.subset(order[: images + ORACLE]), seed=100 * seed)
    others = Quality(quality.names, quality.corruption[images:], quality.severity[images:])
    return mixed.subset(torch.arange(images)), mixed.subset(torch.arange(images, images + ORACLE)), others


def normalized(data: Dataset) -> Tensor:
    """Images (n, c, h, w) ready for the network."""
    return WEIGHTS[NETWORK].normalization.apply(data.images)


def uniform(budget: str) -> bs.Policy:
    """First and last layer at 8 bits, the rest at the budget's."""
    names = [name for name, layer in load(NETWORK, DATA).named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return uniform_policy(names, bs.LayerBits(*BUDGETS[budget]), dict.fromkeys(("conv1", "linear"), bs.LayerBits(8, 8)))


def batches_of(data: Dataset, seed: int) -> bs.Batches:
    """Batches of training images."""
    normalization = WEIGHTS[NETWORK].normalization
    return bs.Batches(dataset=data, normalization=normalization, shuffle=True, augment="crop-flip", seed=seed, drop_last=True)


@torch.no_grad()
def right(network: nn.Module, data: Dataset, decision: Decision | None = None) -> tuple[Tensor, Decision | None, Tensor | None]:
    """Whether each image is classified right, what a dynamic network decided, and BitOps where the network tells them."""
    hits, decisions, bitops = [], [], []
    with evaluating(network):
        for start in range(0, len(data), BATCH):
            rows = slice(start, start + BATCH)
            images = WEIGHTS[NETWORK].normalization.apply(data.images[rows])
            if decision is not None and isinstance(network, DynamicNetwork):
                with network.using(decision[rows]):
                    logits = network(images)
            else:
                logits = network(images)
            assert data.labels is not None
            hits.append(logits.argmax(1) == data.labels[rows])
            if isinstance(network, DynamicNetwork):
                decisions.append(network.decision.detach())
            if isinstance(network, DynamicNetwork | TieredNetwork):
                bitops.append(network.spent.bitops)
    return torch.cat(hits), joined(decisions) if decisions else None, torch.cat(bitops) if bitops else None


def percent(hits: Tensor) -> float:
    """Mean of true values, in percent."""
    return 100.0 * float(hits.float().mean())


def by_quality(hits: Tensor, bits: Tensor | None = None) -> dict[str, Any]:
    """Corruption -> severity -> top-1 in percent, images, mean activation bits where they differ; and the means of parts."""
    _, quality = tests()
    cells: dict[str, Any] = {}
    for index, name in enumerate(quality.names):
        for severity in range(6):
            here = (quality.corruption == index) & (quality.severity == severity)
            if here.any():
                cell = {"top1": percent(hits[here]), "images": int(here.sum())}
                cells.setdefault(name, {})[str(severity)] = {**cell, **({} if bits is None else {"bits": float(bits[here].mean())})}
    seen = torch.tensor([name in TRAINED for name in quality.names])[quality.corruption]
    held_out = torch.tensor([name in HELD_OUT for name in quality.names])[quality.corruption]
    parts = {"clean": quality.corruption == 0, "seen": seen, "held_out": held_out}
    return {"cells": cells, **{name: percent(hits[rows]) for name, rows in parts.items()}}


def limit_of(run: dict[str, Any]) -> float:
    """BitOps of uniform widths: what an image may cost."""
    policy = uniform(run["settings"]["budget"])
    return float(policy_cost(reference(), policy)["bitops"])


@cache
def reference() -> Any:
    """What the layers of the network do."""
    from bitscape.cost.layers import measure

    return measure(load(NETWORK, DATA), (3, 32, 32))


def candidates(run: dict[str, Any]) -> tuple[bs.LayerBits, ...]:
    """Bits that a static policy may choose from: those of the searches, or the weights' fixed and the activations' those of DQMQ."""
    low = LOW.get(run["settings"]["budget"], 2)
    if (run["method"], run["variant"]) == ACTIVATIONS:
        return tuple(bs.LayerBits(BUDGETS[run["settings"]["budget"]][0], bits) for bits in range(low, MOST + 1))
    return tuple(bs.LayerBits(weight, activation) for weight in WIDTHS for activation in sorted({low, *WIDTHS}))


def static(run: dict[str, Any]) -> dict[str, Any]:
    """Train a static policy: uniform, or searched on images of the same mixed quality."""
    data, _, _ = training(run["seed"], run["settings"]["images"])
    policy = uniform(run["settings"]["budget"])
    if run["method"] != UNIFORM[0]:
        problem = SearchProblem.of(
            model=load(NETWORK, DATA),
            samples=Samples.of(normalized(data.subset(torch.arange(KEPT))), None if data.labels is None else data.labels[:KEPT]),
            budget=f"bitops={run['settings']['budget']}",
            candidates=candidates(run),
            seed=run["seed"],
        )
        policy = bs.Fisher(images=SCORED).search(problem, for_training=True).policy
    images = normalized(data.subset(torch.arange(CALIBRATION)))
    network = bs.quantize(load(NETWORK, DATA), policy, images, for_training=True, repair=None, count=CALIBRATION)
    seconds = trained(network, run, Plain(), bs.Sgd(lr=0.01))
    hits, _, _ = right(network, tests()[0])
    cost = policy_cost(reference(), policy)
    return {"top1": percent(hits), "policy": bits_of(policy), "cost": cost, "train_s": seconds, "extra": by_quality(hits)}


def trained(network: nn.Module, run: dict[str, Any], step: Any, optimizer: Any) -> float:
    """Train by the one recipe; return the seconds."""
    data, _, _ = training(run["seed"], run["settings"]["images"])
    start = time.perf_counter()
    train(network, batches_of(data, run["seed"]), step=step, optimizer=optimizer, epochs=run["epochs"], seed=run["seed"])
    return time.perf_counter() - start


def made(run: dict[str, Any], bits: DynamicBits) -> DynamicNetwork:
    """The dynamic network, before training."""
    data, _, _ = training(run["seed"], run["settings"]["images"])
    policy = uniform(run["settings"]["budget"])
    return dynamic_network(load(NETWORK, DATA), policy, normalized(data.subset(torch.arange(CALIBRATION))), bits)


def learned(run: dict[str, Any]) -> dict[str, Any]:
    """Train heads and network; then measure every deployment and the controls that need no training of their own."""
    variant, limit = VARIANTS[run["variant"]], limit_of(run)
    low = LOW.get(run["settings"]["budget"], variant.bits.low)
    network = made(run, replace(variant.bits, low=low))
    network.decisions = variant.decisions
    if variant.begins_at_budget:
        begin_at(network, limit)
    step = Dqmq(bitops=limit, **variant.step)
    seconds = trained(network, run, step, DqmqSgd(sgd=bs.Sgd(lr=0.01), head_lr=variant.head_lr))
    data, _, _ = training(run["seed"], run["settings"]["images"])
    kept = normalized(data.subset(torch.arange(KEPT)))
    before = float(decide(network, kept).bitops(network.cost).mean()) + network.decision_bitops
    keep_bitops(network, kept, limit, budget_of=step.budget_of)
    shift = float(network.shift)
    hits, decision, bitops = right(network, tests()[0])
    assert decision is not None and bitops is not None
    bits = decision.activation_bits(network.cost)
    other = decision[torch.randperm(len(decision), generator=torch.Generator().manual_seed(TEST_SEED))]
    same_network: dict[str, Any] = {"decisions of other images": percent(right(network, tests()[0], other)[0])}
    for level in (BUDGETS[run["settings"]["budget"]][1], variant.bits.high):
        same_network[f"every width {level}"] = percent(right(network, tests()[0], network.level(level, len(decision)))[0])
    if not run["variant"]:
        same_network["each image, in batches of one quality"] = percent(right(network, homogeneous())[0])
        network.decisions = "per_batch"
        for name, data_of_test in (("one decision a batch", tests()[0]), ("one decision a batch of one quality", homogeneous())):
            batch_hits, _, batch_bitops = right(network, data_of_test)
            same_network[name] = percent(batch_hits)
            same_network[f"{name}, bitops"] = float(batch_bitops.mean()) if batch_bitops is not None else None
        network.decisions = "per_image"
        for count in TIERS:
            tiers = distill_tiers(network, normalized(data.subset(torch.arange(DISTILLED))), count)
            tier_hits, _, tier_bitops = right(tiers, tests()[0])
            same_network[f"{count} static tiers"] = percent(tier_hits)
            same_network[f"{count} static tiers, bitops"] = float(tier_bitops.mean()) if tier_bitops is not None else None
        same_network["oracle of the severity"] = oracle(network, run, limit)
    return {
        "top1": percent(hits),
        "cost": {"bitops": float(bitops.mean()), "mean_activation_bits": float(bits.mean())},
        "train_s": seconds,
        "extra": {
            **by_quality(hits, bits),
            "same_network": same_network,
            "decision_share": network.decision_bitops / limit,
            "excess_before_shift": before / limit - 1,
            "shift": shift,
            "bits_over_images": {"least": float(bits.min()), "deviation": float(bits.std()), "largest": float(bits.max())},
            "marginals": marginals(decision, network.bits),
        },
    }


def marginals(decision: Decision, bits: DynamicBits) -> list[list[float]]:
    """For each layer the share of images at each width from low to high."""
    return [
        [float((column == width).float().mean()) for width in range(bits.low, bits.high + 1)] for column in decision.activation.unbind(1)
    ]


def oracle(network: DynamicNetwork, run: dict[str, Any], limit: float) -> float:
    """Top-1 if the true severity decides how many bits the learned decisions are raised or lowered, chosen on held-out training images."""
    _, data, quality = training(run["seed"], run["settings"]["images"])
    learned_shift = float(network.shift)
    accuracy, cost = [], []
    for shift in SHIFTS:
        network.shift.fill_(learned_shift + shift)
        hits, _, bitops = right(network, data)
        assert bitops is not None
        rows = [quality.severity == severity for severity in range(6)]
        accuracy.append([float(hits[row].float().sum()) for row in rows])
        cost.append([float(bitops[row].sum()) for row in rows])
    hits_of_all = []
    tested, its_quality = tests()
    for severity, at in enumerate(chosen(accuracy, cost, max(limit * len(data), sum(cost[SHIFTS.index(0.0)])))):
        network.shift.fill_(learned_shift + SHIFTS[at])
        hits_of_all.append(right(network, tested.subset((its_quality.severity == severity).nonzero().squeeze(1)))[0])
    network.shift.fill_(learned_shift)
    return percent(torch.cat(hits_of_all))


def chosen(accuracy: Sequence[Sequence[float]], cost: Sequence[Sequence[float]], limit: float) -> tuple[int, ...]:
    """For each severity the index of the shift: most images right within the limit, by trying all."""
    severities = range(len(accuracy[0]))
    within = [
        pick for pick in product(range(len(accuracy)), repeat=len(severities)) if sum(cost[at][s] for s, at in enumerate(pick)) <= limit
    ]
    return max(within, key=lambda pick: sum(accuracy[at][s] for s, at in enumerate(pick)))


@dataclass(frozen=True)
class RandomBits:
    """Plain training at widths drawn for every image and layer."""

    marginals: Sequence[Sequence[float]]

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Leave the gradient of the batch in `.grad`."""
        assert isinstance(model, DynamicNetwork) and len(batch.parts) == 1
        with model.using(self.drawn(model, len(batch))):
            return batch.backward(model)

    def drawn(self, network: DynamicNetwork, images: int) -> Decision:
        """Widths for that many images."""
        rows = network.level(network.bits.low, images)
        columns = [
            torch.multinomial(torch.tensor(share), images, replacement=True).float() + network.bits.low
            if layer.name in network.names
            else rows.activation[:, at]
            for at, (layer, share) in enumerate(zip(network.cost.layers, self.marginals, strict=True))
        ]
        return Decision(rows.weight, torch.stack(columns, dim=1))


def random_bits(run: dict[str, Any]) -> dict[str, Any]:
    """Train and test at random widths whose distribution in every layer is what the learned network took."""
    key = {**run, "method": LEARNED[0], "variant": LEARNED[1]}
    (twin,) = [each for each in read_runs(RESULTS / f"{NAME}.jsonl") if all(each[name] == value for name, value in key.items())]
    network, step = made(run, DynamicBits(low=LOW.get(run["settings"]["budget"], 2))), RandomBits(twin["extra"]["marginals"])
    seconds = trained(network, run, step, bs.Sgd(lr=0.01))
    torch.manual_seed(run["seed"])
    drawn = step.drawn(network, len(tests()[0]))
    hits, _, bitops = right(network, tests()[0], drawn)
    bits = drawn.activation_bits(network.cost)
    assert bitops is not None
    cost = {"bitops": float(bitops.mean()), "mean_activation_bits": float(bits.mean())}
    return {"top1": percent(hits), "cost": cost, "train_s": seconds, "extra": by_quality(hits, bits)}


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate."""
    do = {UNIFORM[0]: static, STATIC[0]: static, LEARNED[0]: learned, RANDOM[0]: random_bits}[run["method"]]
    about = {"weights": WEIGHTS[NETWORK].file, "target": CASES[NETWORK].target, "budget": {"bitops": limit_of(run)}}
    shared = {"test_images": len(tests()[0]), "float_top1": WEIGHTS[NETWORK].float_top1, "clock": "wall", "dtype": "float32"}
    return {**run, **about, **shared, **do(run)}


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", action="store_true", help="other forms of the method instead")
    parser.add_argument("--only", choices=list(BUDGETS), help="the runs at one budget")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = wanted(options.seeds, options.images, options.epochs, options.variants)
    do_missing(NAME, KEYS, [run for run in runs if options.only in (None, run["settings"]["budget"])], measure)


if __name__ == "__main__":
    main()
