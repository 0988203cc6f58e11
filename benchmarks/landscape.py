"""landscape: the loss around networks that were trained plainly and for flat minima, in the space of their quantized weights.

    python -m benchmarks.landscape [--images 10000] [--epochs 2] [--threads 1]

ResNet-20 on CIFAR-10 at W2A2, the first runs of the benchmark saq; the loss of 128 training images on a plane of two random directions.
"""

from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common import bits_of, do_missing, recipe_parser
from benchmarks.saq import FULL, LONGER, PLAIN, RHO, policy_of, proxy_of, step_of
from benchmarks.transfer_policies import CASES, trained
from bitscape.sharpness import loss_slice
from recipes.networks import WEIGHTS

NAME, NETWORK = "landscape", "resnet20"
KEYS = ("network", "method", "variant", "settings.budget", "settings.rho", "settings.images", "epochs", "seed")
SEEN, SPAN, POINTS = 128, 0.5, 15


def wanted(images: int, epochs: int) -> list[dict[str, Any]]:
    """The three networks."""
    runs = []
    for key in (PLAIN, LONGER, FULL):
        settings = {"budget": "w2a2", "rho": RHO if key == FULL else None, "images": images}
        run = {"network": NETWORK, "method": key[0], "variant": key[1], "settings": settings, "seed": 0}
        runs.append({**run, "epochs": epochs * (2 if key == LONGER else 1)})
    return runs


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Train, and look around."""
    policy, cost = policy_of(run)
    network, _ = trained(run, policy, step_of(run))
    drawn = proxy_of(NETWORK, f"{CASES[NETWORK].target}:2000", 0)
    assert drawn.labels is not None
    seen = WEIGHTS[NETWORK].normalization.apply(drawn.images[:SEEN])
    found = loss_slice(network, seen, drawn.labels[:SEEN], span=SPAN, points=POINTS)
    return {**run, "target": CASES[NETWORK].target, "policy": bits_of(policy), "cost": cost, "extra": {"slice": asdict(found)}}


def main() -> None:
    """Do the runs that the results file lacks."""
    options = recipe_parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    do_missing(NAME, KEYS, wanted(options.images, options.epochs), measure)


if __name__ == "__main__":
    main()
