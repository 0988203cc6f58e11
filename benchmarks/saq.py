"""saq: does training for flat minima give better quantized networks? ResNet-20 on CIFAR-10 and CIFAR-100, LSQ.

    python -m benchmarks.saq [--images 10000] [--epochs 2] [--seeds 3] [--threads 1] [--only w2a2] [--sweep]

Every row shares quantizer, recipe, data order and policy. Plain training is also given twice the epochs, which is the time of a step of two
passes. The radius is swept once for each quantizer, in runs of a seed that the comparison does not use (`--sweep`). Sharpness is measured
on training images, in the quantized weights; accuracy on corrupted images on 1,000 test images at severities 1, 3 and 5.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import bitscape as bs
from benchmarks.common import bits_of, do_missing, recipe_parser, test_batches
from benchmarks.transfer_policies import CASES, images_of, problem, proxy_of, tests, trained
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.corruptions import CORRUPTIONS, corrupted
from bitscape.engine import Step, StepSettings, evaluate
from bitscape.quant.quantizers import Dorefa, Liq, LsqPlus, Pact, Quantizer
from bitscape.searches.uniform import Uniform
from bitscape.sharpness import Ball, probe_sharpness, top_eigenvalue
from bitscape.steps.plain import Plain
from bitscape.steps.sam import Sam, SharpSettings
from recipes.networks import WEIGHTS

NAME = "saq"
KEYS = ("network", "method", "variant", "settings.budget", "settings.quantizer", "settings.rho", "settings.images", "epochs", "seed")
RHO = 0.003
"""Chosen by the sweep."""
SWEEP, SWEEP_SEED = (0.0003, 0.001, 0.003, 0.01, 0.03), 100
STEPS: dict[tuple[str, str], SharpSettings] = {
    ("sam", "case 2"): Sam(),
    ("saq", "case 1"): bs.Saq(case=1),
    ("saq", "case 3"): bs.Saq(),
    ("saq", "case 3, interval 5"): bs.Saq(interval=5),
    ("saq", "case 3, interval 5, reuse in proportion"): bs.Saq(interval=5, reuse="orthogonal"),
    ("saq", "case 3, interval 10"): bs.Saq(interval=10),
    ("saq", "case 3, interval 10, reuse in proportion"): bs.Saq(interval=10, reuse="orthogonal"),
}
PLAIN, LONGER, FULL = ("plain", ""), ("plain", "twice the epochs"), ("saq", "case 3")
CORRUPTED = (PLAIN, LONGER, FULL)
"""Rows that are measured on corrupted images too."""
QUANTIZERS: dict[str, Quantizer] = {"lsq_plus": LsqPlus(), "pact": Pact(), "dorefa": Dorefa(), "liq": Liq()}
"""Beside LSQ, which every other run has: their radius is swept too."""
BUDGETS = ("w2a2", "w3a3", "w4a4", "searched")
PROBED, CURVED, RADIUS, ADAPTIVE_RADIUS, ITERATIONS = 512, 128, 0.05, 0.2, 10
CORRUPTED_IMAGES, SEVERITIES = 1000, (1, 3, 5)


def wanted(seeds: int, images: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Every run of the comparison, in an order in which a stopped benchmark already compares."""
    first, other = CASES
    every = [*CORRUPTED, *(key for key in STEPS if key not in CORRUPTED)]
    plan = [(first, budget, seed, key) for budget in BUDGETS[:2] for seed in range(seeds) for key in CORRUPTED]
    plan += [(first, budget, 0, key) for budget in BUDGETS[:2] for key in every]
    less = ((first, "searched"), (other, "w2a2"), (other, "w3a3"), (first, "w4a4"))
    plan += [(network, budget, 0, key) for network, budget in less for key in CORRUPTED]
    plan += [(first, budget, seed, key) for seed in range(seeds) for budget in BUDGETS[:2] for key in every]
    plan += [(network, budget, seed, key) for network in (first, other) for budget in BUDGETS for seed in range(seeds) for key in every]
    for network, budget, seed, key in dict.fromkeys(plan):
        times = 2 if key == LONGER else 1
        yield _run(network, key, budget, None if key in (PLAIN, LONGER) else RHO, images, times * epochs, seed)


def swept(images: int, epochs: int) -> Iterator[dict[str, Any]]:
    """The runs by which the radius was chosen."""
    network = next(iter(CASES))
    yield _run(network, PLAIN, "w2a2", None, images, epochs, SWEEP_SEED)
    for key in (FULL, ("saq", "case 3, interval 5"), ("sam", "case 2")):
        for rho in SWEEP if key == FULL else SWEEP[2:4]:
            yield _run(network, key, "w2a2", rho, images, epochs, SWEEP_SEED)
    for quantizer in QUANTIZERS:
        yield _run(network, PLAIN, "w2a2", None, images, epochs, SWEEP_SEED, quantizer)
        for rho in SWEEP:
            yield _run(network, FULL, "w2a2", rho, images, epochs, SWEEP_SEED, quantizer)


def _run(
    network: str, key: tuple[str, str], budget: str, rho: float | None, images: int, epochs: int, seed: int, quantizer: str | None = None
) -> dict[str, Any]:
    settings = {"budget": budget, "rho": rho, "images": images, **({"quantizer": quantizer} if quantizer else {})}
    return {"network": network, "method": key[0], "variant": key[1], "settings": settings, "epochs": epochs, "seed": seed}


def step_of(run: dict[str, Any]) -> Step | StepSettings:
    """The training step of a run."""
    key = run["method"], run["variant"]
    if key in (PLAIN, LONGER):
        return Plain()
    given = STEPS[key]
    return type(given)(**{**vars(given), "rho": run["settings"]["rho"]})


def policy_of(run: dict[str, Any]) -> tuple[bs.Policy, dict[str, float]]:
    """Uniform bits, or those that a search on 4 % of the target's images finds at the cost of w3a3."""
    budget, own = run["settings"]["budget"], f"{CASES[run['network']].target}:2000"
    searched = budget == "searched"
    variant = "for training" if searched else ""
    about = {"network": run["network"], "proxy": own if searched else None, "variant": variant, "seed": run["seed"]}
    stated = problem({**about, "settings": {"budget": "w3a3" if searched else budget}})
    found = bs.Fisher(images=PROBED).search(stated, for_training=True) if searched else Uniform().search(stated)
    return found.policy, policy_cost(stated.network, found.policy)


def sharpness(network: nn.Module, run: dict[str, Any]) -> dict[str, float]:
    """Probe sharpness and top eigenvalue in the quantized weights, on training images."""
    drawn = proxy_of(run["network"], f"{CASES[run['network']].target}:2000", 0)
    images, labels = WEIGHTS[run["network"]].normalization.apply(drawn.images), drawn.labels
    assert labels is not None
    probed = probe_sharpness(network, images[:PROBED], labels[:PROBED], radius=RADIUS)
    by_size = probe_sharpness(network, images[:PROBED], labels[:PROBED], radius=ADAPTIVE_RADIUS, ball=Ball(adaptive=True))
    curved = top_eigenvalue(network, images[:CURVED], labels[:CURVED], iterations=ITERATIONS)
    curvature = {"eigenvalue": curved.value, "eigenvalue_residual": curved.residual}
    return {"training_loss": probed.loss, "gap": probed.gap, "adaptive_gap": by_size.gap, **curvature}


def on_corrupted(network: nn.Module, name: str) -> dict[str, float]:
    """Corruption -> top-1 in percent, the mean over SEVERITIES; "mean" over all corruptions."""
    data = images_of(CASES[name].test).subset(torch.arange(CORRUPTED_IMAGES))
    found = {}
    for corruption in CORRUPTIONS:
        graded = [corrupted(data, corruption, severity, seed=severity) for severity in SEVERITIES]
        scores = [bs.evaluate(network, test_batches(each, WEIGHTS[name].normalization)).value for each in graded]
        found[corruption] = sum(scores) / len(scores)
    return {**found, "mean": sum(found.values()) / len(found)}


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate, measure the sharpness."""
    policy, cost = policy_of(run)
    network, extra = trained(run, policy, step_of(run), QUANTIZERS.get(run["settings"].get("quantizer", "")))
    accuracy = evaluate(network, tests(run["network"]))
    robust = run["seed"] != SWEEP_SEED and (run["method"], run["variant"]) in CORRUPTED
    return {
        **run,
        "weights": WEIGHTS[run["network"]].file,
        "target": CASES[run["network"]].target,
        "policy": bits_of(policy),
        "cost": cost,
        "step": run["method"],
        "top1": accuracy.top1,
        "float_top1": WEIGHTS[run["network"]].float_top1,
        "test_images": accuracy.images,
        "train_s": extra.pop("train_s"),
        "clock": "wall",
        "dtype": "float32",
        "extra": {
            "test_loss": accuracy.loss,
            **sharpness(network, run),
            **({"corrupted": on_corrupted(network, run["network"])} if robust else {}),
            **extra,
        },
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="one budget: " + ", ".join(BUDGETS))
    parser.add_argument("--sweep", action="store_true", help="the runs by which the radius is chosen")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = options.images, options.epochs
    runs = swept(*recipe) if options.sweep else wanted(options.seeds, *recipe)
    do_missing(NAME, KEYS, [run for run in runs if options.only in (None, run["settings"]["budget"])], measure)


if __name__ == "__main__":
    main()
