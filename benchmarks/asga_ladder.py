"""asga-ladder: what each part of ASGA adds to the mixture search. ResNet-20 on CIFAR-10, proxy of 4 %, "2.5 bits".

    python -m benchmarks.asga_ladder [--images 10000] [--epochs 2] [--seeds 3] [--threads 1] [--part 0/2]

Measured on the trained mixture: the surrogate gap and the curvature at one fixed probe radius, on 512 proxy images. Measured on the policy:
accuracy after the training that transfer-policies uses. `--part i/n` does every n-th missing run.
"""

import time
from collections.abc import Iterator
from typing import Any

import bitscape as bs
from benchmarks.common import bits_of, do_recipe
from benchmarks.transfer_policies import CASES, SEARCH_EPOCHS, problem, tests, trained
from bitscape.cost.policy_cost import policy_cost
from bitscape.engine import evaluate
from bitscape.searches.allocation import allocate
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.mixture_search import MixtureSettings, train_mixture
from bitscape.searches.readout import probability_scores
from bitscape.sharpness import probe_sharpness
from recipes.networks import WEIGHTS

NAME = "asga-ladder"
KEYS = ("network", "method", "variant", "proxy", "settings.budget", "settings.images", "epochs", "seed")
LADDER: dict[str, MixtureSettings] = {
    "base": Differentiable(epochs=SEARCH_EPOCHS),
    "+ SAM": bs.Asga(epochs=SEARCH_EPOCHS, radius="fixed", alignment=0.0, descent="perturbed"),
    "+ alignment, fixed radius": bs.Asga(epochs=SEARCH_EPOCHS, radius="fixed"),
    "+ adaptive radius": bs.Asga(epochs=SEARCH_EPOCHS),
}
PROBED = 512
RADIUS = 0.05


def wanted(seeds: int, images: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Every run, seed by seed."""
    for seed in range(seeds):
        for variant, method in LADDER.items():
            run = {"network": "resnet20", "method": type(method).__name__.lower(), "variant": variant, "proxy": "cifar10:2000"}
            yield {**run, "settings": {"budget": "w2a3", "images": images}, "epochs": epochs, "seed": seed}


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Search, probe the mixture, train at the policy, evaluate."""
    stated = problem(run)
    start = time.monotonic()
    settings = LADDER[run["variant"]]
    found = train_mixture(stated, settings, settings.make_step)
    scores = probability_scores(stated, run["method"], found.mixed)
    policy = allocate(scores, stated.choices)
    search_s = time.monotonic() - start
    data = found.task.data.rows(slice(0, PROBED))
    probed = probe_sharpness(found.mixed.model, data.inputs, data.targets, radius=RADIUS)
    network, extra = trained(run, policy)
    accuracy = evaluate(network, tests(run["network"]))
    return {
        **run,
        "weights": WEIGHTS[run["network"]].file,
        "target": CASES[run["network"]].target,
        "policy": bits_of(policy),
        "budget": dict(stated.choices.budget.caps),
        "cost": policy_cost(stated.network, policy),
        "step": "plain",
        "top1": accuracy.top1,
        "float_top1": WEIGHTS[run["network"]].float_top1,
        "test_images": accuracy.images,
        "search_s": search_s,
        "train_s": extra["train_s"],
        "clock": "wall",
        "dtype": "float32",
        "extra": {
            "proxy_loss": probed.loss,
            "gap": probed.gap,
            "curvature": probed.curvature,
            "gradient_norm": probed.gradient_norm,
            "radius": RADIUS,
            "test_loss": accuracy.loss,
            "trace": [dict(epoch) for epoch in found.records],
        },
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    do_recipe(__doc__, NAME, KEYS, wanted, measure)


if __name__ == "__main__":
    main()
