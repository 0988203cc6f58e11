"""Steps of training and of mixture searches, done in turn: speeds, their ratio, peak memory."""

import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import input_size, published
from benchmarks.speed_clock import clocked, forget_peak, resident
from benchmarks.speed_peers import brevitas_network, pt2e_network
from bitscape.cost.layers import measure
from bitscape.engine import Batch
from bitscape.engine.forward import autocast_on
from bitscape.engine.step import CrossEntropy
from bitscape.models.layers import layer_shapes
from bitscape.policy import uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.mixed_network import MixtureSgd, mixed_network
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import proxy_task

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
WIDTHS = (2, 3, 4, 6, 8)
"""Candidates of a mixture, for weights and for inputs."""
SEARCHES = {"mixture": Differentiable(), "asga": bs.Asga()}

Step = Callable[[], None]


def synthetic_images(network: str, images: int) -> Tensor:
    """Images (n, 3, h, w) of standard normal noise."""
    size = input_size(network)
    noise = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(memory_format=torch.channels_last)


def four_bits(model: nn.Module, images: Tensor) -> bs.Policy:
    """4-bit weights and activations, first and last layer at 8."""
    pinned = dict.fromkeys(measure(model, tuple(images.shape[1:])).ends, bs.LayerBits.EIGHT)
    return uniform_policy(layer_shapes(model), bs.LayerBits(4, 4), pinned)


def quantized(network: str, images: Tensor) -> nn.Module:
    """LSQ with the bits of `four_bits`."""
    model = published(network)
    return calibrate(with_quantizers(model, four_bits(model, images)), images)


TRAINED: dict[str, Callable[[str, Tensor], nn.Module]] = {
    "float": lambda network, _: published(network),
    "lsq": quantized,
    "brevitas": brevitas_network,
    "pt2e": pt2e_network,
}
"""Kind of training step -> the network to train, from its name and images."""


def training_step(
    model: nn.Module, images: Tensor, *, dtype: torch.dtype | None, compiled: bool
) -> Step:
    """A function that does one step: forward, backward, SGD."""
    model.train()  # of an exported graph it returns nothing
    model.to(memory_format=torch.channels_last)
    optimizer = bs.Sgd(lr=1e-5).build(model)
    forward = torch.compile(model) if compiled else model
    labels = torch.arange(len(images)) % 10

    def step() -> None:
        with autocast_on(images.device, dtype):
            logits = forward(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def search_step(network: str, images: Tensor, *, kind: str, compiled: bool) -> Step:
    """A function that does one step of a search in SEARCHES: price of bits, passes, SGD."""
    candidates = tuple(bs.LayerBits(*pair) for pair in product(WIDTHS, WIDTHS))
    problem = SearchProblem.of(
        model=published(network), samples=images, budget="bitops=w4a4", candidates=candidates
    )
    learned = proxy_task(problem, "follow", batch_size=len(images), head_epochs=1, folder=None)
    mixed = mixed_network(problem, learned.model)
    work = SEARCHES[kind].make_step(mixed, learned)
    model = mixed.model.train().to(memory_format=torch.channels_last)
    optimizer = MixtureSgd(sgd=bs.Sgd(lr=1e-5), logit_lr=1e-5).build(model)
    forward = torch.compile(model) if compiled else model
    labels = torch.arange(len(images)) % 10

    def step() -> None:
        work(forward, Batch.of(images, labels, CrossEntropy()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of(
    kind: str,
    network: str,
    images: Tensor,
    *,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Step:
    """One step of a kind, one of TRAINED or SEARCHES."""
    if kind in SEARCHES:
        return search_step(network, images, kind=kind, compiled=compiled)
    return training_step(TRAINED[kind](network, images), images, dtype=dtype, compiled=compiled)


COMPARED = {
    "train": ("float", "lsq"),
    "brevitas": ("float", "brevitas"),
    "pt2e": ("float", "pt2e"),
    "mixture": ("float", "mixture"),
    "asga": ("mixture", "asga"),
}
"""Method of a run -> the two kinds of step, the one that is 1 first."""


def measure_steps(run: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Images a second of both kinds of step, and the ratio; for searches also peak memory."""
    method, network = run["method"], run["network"]
    images = synthetic_images(network, run["settings"]["batch_size"])
    compiled, kinds = run["variant"] == "compiled", COMPARED[method]
    # Peaks first: in this process the steps would hold memory beside them.
    peaks = peak_memory(run, kinds) if method in SEARCHES and not compiled else {}
    steps = {
        kind: step_of(kind, network, images, dtype=DTYPES[run["dtype"]], compiled=compiled)
        for kind in kinds
    }
    timed = alternated(steps, len(images), rounds)
    return {**timed, **peaks, "memory_format": "channels_last"}


def seconds_in_turn(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Process CPU seconds of each step in every round; every other round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds):
        for name in sorted(steps, reverse=bool(at % 2)):
            seconds[name].append(clocked(steps[name])["process_s"])
    return seconds


def alternated(steps: Mapping[str, Step], images: int, rounds: int) -> dict[str, Any]:
    """Do the two steps in turn; the ratio is the second's images a second over the first's."""
    start_up = {
        name: sum(clocked(step)["wall_s"] for _ in range(2)) for name, step in steps.items()
    }
    seconds = seconds_in_turn(steps, rounds)
    ratios = [first / second for first, second in zip(*seconds.values(), strict=True)]
    speeds = {
        f"{name}_images_per_s": round(images / statistics.median(taken), 2)
        for name, taken in seconds.items()
    }
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        **speeds,
        "rounds": rounds,
        "start_up_wall_s": {name: round(taken, 1) for name, taken in start_up.items()},
    }


def peak_memory(run: dict[str, Any], kinds: tuple[str, str]) -> dict[str, Any]:
    """Peak bytes of both kinds of step, and those of the second over those of the first."""
    peaks = {}
    for kind in kinds:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
            peaks[kind] = own.submit(
                peak_bytes, kind, run["network"], run["settings"]["batch_size"], run["threads"]
            ).result()
    first, second = peaks.values()
    return {
        "memory_ratio": round(second / first, 3),
        **{f"{kind}_peak_bytes": peak for kind, peak in peaks.items()},
    }


def peak_bytes(kind: str, network: str, batch_size: int, threads: int) -> int:
    """The process's highest resident size during three steps, less its size now."""
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    step = step_of(kind, network, synthetic_images(network, batch_size))
    forget_peak()  # calibration is no step
    for _ in range(3):
        step()
    return resident("VmHWM") - before
