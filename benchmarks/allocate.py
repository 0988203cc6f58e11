"""allocate: seconds and gap of the exact allocation, on random layers, equal blocks, nearly equal costs, and scores of real networks.

    python -m benchmarks.allocate [--only "near 500"] [--time-limit-s 120]

Caps are BitOps, weight bytes and mean activation bits, the first two or all three, near the cost of 3, 4 and 5 bits everywhere. Scores
fall as quantization noise does, over several magnitudes; of ResNet-20 and MobileNetV2 they are Fisher's. Process CPU time, so that other
programs on the machine disturb little; the time limit is of wall clock, which is noted beside it. Runs that the results file has are
left out.
"""

import argparse
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

import bitscape as bs
from benchmarks.common import DATA, dataset, do_missing, proxy_images
from benchmarks.speed_clock import clocked
from benchmarks.speed_jobs import network_of, random_scores, random_sizes
from bitscape.cost.budget import Budget
from bitscape.cost.layers import NetworkProfile
from bitscape.cost.policy_cost import cost
from bitscape.policy import uniform_policy
from bitscape.searches.allocation import allocate
from bitscape.searches.choices import DEFAULT_CANDIDATES, Choices
from bitscape.searches.problem import SearchProblem
from bitscape.searches.scores import ScoreTable
from recipes.networks import load

NAME = "allocate"
KEYS = ("network", "settings", "seed")
KINDS = ("bitops", "weight_bytes", "mean_activation_bits")
SIZES = ((60, 25, 2), (150, 36, 3), (500, 36, 3))
TIGHTNESS = ((3, 1.0), (4, 0.93), (5, 0.97))
"""Bits, and the share of their cost, of each seed's caps."""
BLOCK = ((100_000_000, 40_000, 100_000), (300_000_000, 120_000, 100_000), (50_000_000, 20_000, 400_000), (100_000_000, 40_000, 300_000))
REAL = {"resnet20": ("cifar10_train", 128), "mobilenetv2_tfslim": ("imagenet_sample1k", 32)}
"""Network -> images that score it: where they come from, and how many."""


def wanted() -> Iterator[dict[str, Any]]:
    """Every run, the quick ones first."""
    for layers, pairs, caps in SIZES:
        for network in ("random", "blocks", "near 3e-9", "near 1e-6", "near 1e-2"):
            for seed in range(len(TIGHTNESS)):
                yield {"network": network, "settings": {"layers": layers, "pairs": pairs, "caps": caps}, "seed": seed}
    for network in REAL:
        for seed in range(len(TIGHTNESS)):
            yield {"network": network, "settings": {"pairs": 36, "caps": 3}, "seed": seed}


def made_network(kind: str, layers: int, seed: int) -> NetworkProfile:
    """Layers of random size over three magnitudes, of four sizes in turn, or of one size but for a relative spread."""
    if kind == "random":
        return network_of(random_sizes(layers, seed))
    if kind == "blocks":
        return network_of(np.array([BLOCK[at % len(BLOCK)] for at in range(layers)]))
    spread = np.random.default_rng(seed).integers(0, max(3, int(1e9 * float(kind.split()[1]))), (layers, 3))
    return network_of(np.array([1e9, 1e6, 1e6]) + spread / [1, 1e3, 1e3])


@cache
def scored(network: str) -> tuple[SearchProblem, ScoreTable]:
    """A real network with Fisher's scores."""
    source, images = REAL[network]
    proxy = proxy_images(dataset(source), network, images, 0)
    problem = SearchProblem.of(model=load(network, DATA), samples=proxy, budget="bitops=w4a4")
    return problem, bs.Fisher(images=images).score(problem)


def stated(run: dict[str, Any]) -> tuple[ScoreTable, NetworkProfile, dict[str, bs.LayerBits]]:
    """Scores, costs and pinned layers of a run."""
    if run["network"] in REAL:
        problem, scores = scored(run["network"])
        return scores, problem.network, dict(problem.choices.freedom.pinned)
    settings = run["settings"]
    network = made_network(run["network"], settings["layers"], run["seed"])
    widths = (2, 3, 4, 6, 8)
    few = tuple(bs.LayerBits(weight, activation) for weight in widths for activation in widths)
    candidates = few if settings["pairs"] == len(few) else DEFAULT_CANDIDATES
    return random_scores(tuple(network.by_name), candidates, run["seed"]), network, {}


def measure(run: dict[str, Any], time_limit_s: float) -> dict[str, Any]:
    """Allocate once and tell the time and the gap."""
    scores, network, pinned = stated(run)
    bits, share = TIGHTNESS[run["seed"]]
    reference = uniform_policy(network.by_name, bs.LayerBits(bits, bits), pinned)
    budget = Budget({kind: share * cost(kind, network, reference) for kind in KINDS[: run["settings"]["caps"]]})
    choices = Choices.of(network, budget, candidates=scores.candidates, pinned=pinned)
    policies: list[bs.Policy] = []
    before = os.getloadavg()[0]
    clocks = clocked(lambda: policies.append(allocate(scores, choices, time_limit_s=time_limit_s)))
    extra = {"wall_s": clocks["wall_s"], "gap": policies[0].provenance["gap"], "score": policies[0].provenance["score"]}
    return {**run, "search_s": clocks["process_s"], "clock": "process", "extra": {**extra, "load_average": before}}


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose network and number of layers hold this text")
    parser.add_argument("--time-limit-s", type=float, default=120.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run for run in wanted() if options.only in f"{run['network']} {run['settings'].get('layers', '')}"]
    do_missing(NAME, KEYS, runs, lambda run: measure(run, options.time_limit_s))


if __name__ == "__main__":
    main()
