"""speed: training and mixture-search images a second against float, seconds of a Fisher search, of an allocation. On the CPU.

    python -m benchmarks.speed [--threads 1] [--only "train resnet20"] [--rounds 9] [--keep-memory]

All times are process CPU time, so that other programs on the machine disturb little; wall time and the load average are noted beside them.
A ratio alternates both kinds of step in one process and takes the median of the rounds' ratios: same dtype, both channels_last, both
eager or both compiled. `train` sets LSQ against float, `mixture` the step of a mixture search against float, `asga` its step against
that of the plain mixture search. `--only` takes the runs whose label holds the text, such as "train mobilenetv2_tfslim bfloat16 compiled".

Peak memory of a kind of step is the highest resident size during three eager steps, in a process of its own with the default allocator,
less the size after the imports: weights, gradients, optimizer and images count. Only Linux tells it.

`--keep-memory` tells glibc to keep freed memory: by default large tensors go back to the system and their pages are faulted in again
every step, which costs the quantized network more, as it makes more tensors. How much glibc keeps depends on what a process freed
before, so that every run has a process of its own.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bitscape as bs
from benchmarks.common import DATA, RESULTS, both_ends, dataset, proxy_images, record
from bitscape.cli.memory import keep_freed_memory
from bitscape.cost.budget import parse_budget
from bitscape.cost.layers import LayerCost, NetworkProfile, measure
from bitscape.engine import Batch
from bitscape.engine.forward import autocast_on
from bitscape.engine.step import CrossEntropy
from bitscape.models.layers import layer_shapes
from bitscape.policy import uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.report.records import missing, read_runs
from bitscape.searches.allocation import allocate
from bitscape.searches.choices import DEFAULT_CANDIDATES, Choices
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.mixed_network import MixtureSgd, mixed_network
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import proxy_task
from bitscape.searches.scores import ScoreTable
from recipes.networks import WEIGHTS, load

NAME = "speed"
KEYS = ("method", "network", "variant", "dtype", "settings", "threads")
BATCH = {"resnet20": 128, "mobilenetv2_tfslim": 8}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
CANDIDATES = {"36 pairs": DEFAULT_CANDIDATES, "6 weight widths": tuple(bs.LayerBits(bits, 8) for bits in (2, 3, 4, 5, 6, 8))}
IMAGES = 256
ALLOCATION = {"layers": 60, "pairs": 25, "caps": 2, "instances": 8}

WIDTHS = (2, 3, 4, 6, 8)
"""Candidates of a mixture, for weights and for inputs."""
SEARCHES = {"mixture": Differentiable(), "asga": bs.Asga()}
SEARCH_BATCH = {"resnet20": 128, "mobilenetv2_tfslim": 16}

KEPT = "glibc, freed memory kept"

Clocks = dict[str, float]
Step = Callable[[], None]


def wanted(threads: int, allocator: str) -> Iterator[dict[str, Any]]:
    """Every run of this process, the quick ones first; the allocator matters to training and search."""
    shared = {"threads": threads}
    if allocator == "default":
        yield {**shared, "method": "allocate", "variant": "", "settings": ALLOCATION}
    for network, variant in product(BATCH, CANDIDATES):
        kept = {} if allocator == "default" else {"allocator": allocator}
        yield {**shared, "method": "fisher", "network": network, "variant": variant, "settings": {"images": IMAGES, **kept}}
    for variant, network, dtype in product(("eager", "compiled"), BATCH, DTYPES):
        settings = {"bits": "w4a4", "batch_size": BATCH[network], "allocator": allocator, "process": "own"}
        yield {**shared, "method": "train", "network": network, "variant": variant, "dtype": dtype, "settings": settings}
    for (method, variant), network in product((("mixture", "eager"), ("asga", "eager"), ("mixture", "compiled")), SEARCH_BATCH):
        widths = " ".join(map(str, WIDTHS))
        settings = {"widths": widths, "batch_size": SEARCH_BATCH[network], "allocator": allocator, "process": "own"}
        yield {**shared, "method": method, "network": network, "variant": variant, "dtype": "float32", "settings": settings}


def label(run: dict[str, Any]) -> str:
    """What `--only` looks into."""
    return " ".join(run[key] for key in ("method", "network", "dtype", "variant") if run.get(key))


def clocked(work: Callable[[], Any]) -> Clocks:
    """Process CPU and wall seconds of `work`."""
    wall, process = time.perf_counter(), time.process_time()
    work()
    return {"process_s": time.process_time() - process, "wall_s": time.perf_counter() - wall}


def synthetic_images(network: str, images: int) -> Tensor:
    """Images (n, 3, h, w) of standard normal noise."""
    size = WEIGHTS[network].input_size
    noise = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(memory_format=torch.channels_last)


def quantized(network: str, images: Tensor) -> nn.Module:
    """LSQ with 4-bit weights and activations, first and last layer at 8."""
    model = load(network, DATA)
    pinned = dict.fromkeys(measure(model, tuple(images.shape[1:])).ends, bs.LayerBits.EIGHT)
    return calibrate(with_quantizers(model, uniform_policy(layer_shapes(model), bs.LayerBits(4, 4), pinned)), images)


def training_step(model: nn.Module, images: Tensor, *, dtype: torch.dtype | None, compiled: bool) -> Step:
    """A function that does one step: forward, backward, SGD."""
    model = model.train().to(memory_format=torch.channels_last)
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
    problem = SearchProblem.of(model=load(network, DATA), samples=images, budget="bitops=w4a4", candidates=candidates)
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


def step_of(kind: str, network: str, images: Tensor, *, dtype: torch.dtype | None = None, compiled: bool = False) -> Step:
    """One step of a kind: "float", "lsq", "mixture" or "asga"."""
    if kind in SEARCHES:
        return search_step(network, images, kind=kind, compiled=compiled)
    model = load(network, DATA) if kind == "float" else quantized(network, images)
    return training_step(model, images, dtype=dtype, compiled=compiled)


COMPARED = {"train": ("float", "lsq"), "mixture": ("float", "mixture"), "asga": ("mixture", "asga")}
"""Method of a run -> the two kinds of step, the one that is 1 first."""


def measure_steps(run: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Images a second of both kinds of step, and the ratio; for searches also peak memory."""
    images = synthetic_images(run["network"], run["settings"]["batch_size"])
    how: dict[str, Any] = {"dtype": DTYPES[run["dtype"]], "compiled": run["variant"] == "compiled"}
    kinds = COMPARED[run["method"]]
    # Peaks first: in this process the steps would hold memory beside them.
    peaks = peak_memory(run, kinds) if run["method"] != "train" and not how["compiled"] else {}
    timed = alternated({kind: step_of(kind, run["network"], images, **how) for kind in kinds}, len(images), rounds)
    return {**timed, **peaks, "memory_format": "channels_last"}


def alternated(steps: Mapping[str, Step], images: int, rounds: int) -> dict[str, Any]:
    """Do the two steps in turn; the ratio is images a second of the second over those of the first."""
    start_up = {name: sum(clocked(step)["wall_s"] for _ in range(2)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds):
        for name in sorted(steps, reverse=bool(at % 2)):
            seconds[name].append(clocked(steps[name])["process_s"])
    ratios = [first / second for first, second in zip(*seconds.values(), strict=True)]
    speeds = {f"{name}_images_per_s": round(images / statistics.median(taken), 2) for name, taken in seconds.items()}
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
            peaks[kind] = own.submit(peak_bytes, kind, run["network"], run["settings"]["batch_size"], run["threads"]).result()
    first, second = peaks.values()
    return {"memory_ratio": round(second / first, 3), **{f"{kind}_peak_bytes": peak for kind, peak in peaks.items()}}


def peak_bytes(kind: str, network: str, batch_size: int, threads: int) -> int:
    """The process's highest resident size during three steps, less its size now."""
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    step = step_of(kind, network, synthetic_images(network, batch_size))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: calibration is no step
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, the resident size now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def search_images(network: str) -> Tensor:
    """Real images, normalized for the network."""
    if network == "resnet20":
        return proxy_images(dataset("cifar10_train"), network, IMAGES, seed=0)
    sample = dataset("imagenet_sample1k").cropped(WEIGHTS[network].input_size)
    return WEIGHTS[network].normalization.apply(sample.subset(slice(0, IMAGES)).images)


def measure_search(run: dict[str, Any]) -> Clocks:
    """From a float network and images to a policy: one dry pass for costs, ranges, scores, allocation."""
    model, images = load(run["network"], DATA), search_images(run["network"])
    pinned, candidates = both_ends(model, images), CANDIDATES[run["variant"]]

    def search() -> None:
        problem = SearchProblem.of(model, images, "weight_bytes=w4", candidates=candidates, pinned=pinned)
        bs.Fisher(images=IMAGES).search(problem)

    return clocked(search)


def random_costs(seed: int) -> NetworkProfile:
    """Layers of random size, over three magnitudes."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log([1e5, 1e2, 1e2]), np.log([1e8, 1e6, 1e5]), (ALLOCATION["layers"], 3))).astype(int).tolist()
    layers = [
        LayerCost(
            name=f"layer{at}",
            kind="Linear",
            macs=macs,
            weights=16 * columns,
            weight_shape=(16, columns),
            scales=16,
            input_elements=inputs,
            output_elements=inputs,
        )
        for at, (macs, columns, inputs) in enumerate(sizes)
    ]
    return NetworkProfile(layers=tuple(layers), input_shape=(3, 32, 32))


def random_scores(names: tuple[str, ...], candidates: tuple[bs.LayerBits, ...], seed: int) -> ScoreTable:
    """Scores that fall with bits as quantization noise does, layers differing over several magnitudes."""
    rng = np.random.default_rng(seed)
    weight, activation = np.exp(rng.normal(0, 2, (2, len(names), 1)))
    bits = np.array([(c.weight, c.activation) for c in candidates], dtype=float).T
    values = weight * 4.0 ** -bits[0] + activation * 4.0 ** -bits[1]
    return ScoreTable(names, candidates, values * np.exp(rng.normal(0, 0.1, values.shape)), "random")


def allocation_clocks(seed: int) -> Clocks:
    """One instance; tightness goes round from 3 to 5 bits."""
    network, candidates = random_costs(seed), tuple(bs.LayerBits(w, a) for w, a in product((2, 3, 4, 6, 8), repeat=2))
    bits = 3 + seed % 3
    budget = parse_budget([f"bitops=w{bits}a{bits}", f"weight_bytes=w{bits}"], network, {})
    scores = random_scores(tuple(network.by_name), candidates, seed)
    choices = Choices.of(network, budget, candidates=candidates, pinned={})
    return clocked(lambda: allocate(scores, choices))


def measure_allocation() -> dict[str, Any]:
    """Median and maximum over the instances."""
    taken = [allocation_clocks(seed) for seed in range(ALLOCATION["instances"])]
    columns = {clock: [one[clock] for one in taken] for clock in ("process_s", "wall_s")}
    return {
        **{clock: statistics.median(values) for clock, values in columns.items()},
        **{f"max_{clock}": max(values) for clock, values in columns.items()},
    }


def measured(run: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Do one run and return its fields."""
    before = os.getloadavg()[0]
    if run["method"] in COMPARED:
        found = measure_steps(run, rounds)
    else:
        found = measure_search(run) if run["method"] == "fisher" else measure_allocation()
    fields = {"search_s": found.pop("process_s")} if "process_s" in found else {}
    extra = {**found, "load_average": [round(before, 2), round(os.getloadavg()[0], 2)]}
    return {**run, **fields, "clock": "process", "extra": extra}


def do(run: dict[str, Any], rounds: int, keep_memory: bool) -> None:
    """Do one run and write it down; what a new process starts with."""
    torch.set_num_threads(run["threads"])
    if keep_memory and not keep_freed_memory():
        raise OSError("mallopt refused; --keep-memory needs glibc")
    record(NAME, measured(run, rounds))


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", help="text in a run's label; may be given several times")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of a ratio")
    parser.add_argument("--keep-memory", action="store_true", help="let glibc keep freed memory")
    options = parser.parse_args()
    allocator, compiler = KEPT if options.keep_memory else "default", os.environ.get("CXX", "g++")
    runs = [run for run in wanted(options.threads, allocator) if any(text in label(run) for text in options.only or [""])]
    for run in missing(read_runs(RESULTS / f"{NAME}.jsonl"), runs, KEYS):
        if run.get("variant") == "compiled" and shutil.which(compiler) is None:
            print(f"left out: {label(dict(run))}: torch.compile needs a C++ compiler, and {compiler!r} is not there")
            continue
        process = multiprocessing.get_context("spawn").Process(target=do, args=(dict(run), options.rounds, options.keep_memory))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{label(dict(run))}: its process ended with {process.exitcode}")


if __name__ == "__main__":
    main()
