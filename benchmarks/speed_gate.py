"""A quick gate: five ratios of speed beside stored ones, in about a minute. `make speed` runs it.

    python -m benchmarks.speed_gate [--store]

Each ratio is the process CPU time of our work over that of plain work beside it, done in turn on
one thread: more is slower. One that grew by more than the tolerance fails. `--store` writes what
was measured, on a quiet machine: benchmarks/results/speed-gate.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.common import RESULTS, published
from benchmarks.speed_jobs import fisher
from benchmarks.speed_kernels import SHAPE
from benchmarks.speed_steps import Step, seconds_in_turn, step_of, synthetic_images
from bitscape.cli.memory import keep_freed_memory
from bitscape.files import write_atomic
from bitscape.quant import operators
from bitscape.quant.grid import Grid
from bitscape.report.records import environment

FILE = RESULTS / "speed-gate.json"
NETWORK = "resnet20"
TOLERANCE = 0.15
"""Share by which a ratio may exceed the stored one: what busy machines were seen to add."""

Pair = tuple[Step, Step]


def steps(kind: str, dtype: torch.dtype | None) -> Pair:
    """A float training step, and one of a kind."""
    images = synthetic_images(NETWORK, 128)
    plain, ours = (step_of(each, NETWORK, images, dtype=dtype) for each in ("float", kind))
    return plain, ours


def fake_quantize() -> Pair:
    """A copy of a tensor and of its gradient, and both passes of fake-quantization."""
    x, gradient = torch.randn(2, *SHAPE)
    scale, grid = torch.tensor(0.3), Grid(-8, 7)

    def copies() -> None:
        x.clone()
        gradient.clone()

    def passes() -> None:
        operators.quantized(x, scale, grid)
        operators.quantized_backward(gradient, x, scale, grid)

    return copies, passes


def scoring() -> Pair:
    """A forward pass in float, and a Fisher search, on the same images."""
    model, images = published(NETWORK), synthetic_images(NETWORK, 64)
    return torch.no_grad()(partial(model, images)), partial(fisher, model, images)


GATE: dict[str, tuple[Callable[[], Pair], int]] = {
    "LSQ over float, ResNet-20, float32": (partial(steps, "lsq", None), 9),
    "LSQ over float, ResNet-20, bfloat16": (partial(steps, "lsq", torch.bfloat16), 9),
    "mixture over float, ResNet-20": (partial(steps, "mixture", None), 7),
    "fake-quantization over a copy, both passes": (fake_quantize, 51),
    "Fisher search over a forward pass, ResNet-20": (scoring, 5),
}
"""Ratio -> what makes its two kinds of work, and the rounds of its median."""


def measured(make: Callable[[], Pair], rounds: int) -> float:
    """The median over rounds of the second's time over the first's."""
    plain, ours = make()
    for work in (plain, ours) * 2:
        work()
    taken = seconds_in_turn({"plain": plain, "ours": ours}, rounds)
    ratios = [ours / plain for plain, ours in zip(taken["plain"], taken["ours"], strict=True)]
    return round(statistics.median(ratios), 3)


def failures(stored: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """A line for each ratio that exceeds the stored one by more than the tolerance."""
    return [
        f"slower: {name}: {ratio:.3f}, stored {stored[name]:.3f}, tolerance {TOLERANCE:.0%}"
        for name, ratio in found.items()
        if ratio > stored[name] * (1 + TOLERANCE)
    ]


def main() -> None:
    """Measure, then compare or store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true", help="store what is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found: dict[str, Any] = {}
    for name, (make, rounds) in GATE.items():
        found[name] = measured(make, rounds)
        print(f"{name}: {found[name]:.3f}", flush=True)
    if options.store:
        here = environment()
        stored = {"ratios": found, "device": f"{here['cpu']}, {here['cores']} cores"}
        write_atomic(FILE, json.dumps({**stored, "versions": here["versions"]}, indent=2) + "\n")
        return
    if lines := failures(json.loads(FILE.read_text(encoding="utf-8"))["ratios"], found):
        advice = "`make speed STORE=1` on a quiet machine stores new ratios"
        sys.exit("\n".join([*lines, advice]))


if __name__ == "__main__":
    main()
