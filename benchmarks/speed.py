"""speed: training and searches against float and other toolkits, kernels, whole jobs. On the CPU.

    python -m benchmarks.speed [--only "train resnet20"] [--rounds 9] [--images 256]

All times are process CPU time, so that other programs on the machine disturb little; wall time and
the load average are noted beside them. Every run has a process of its own.

- A ratio alternates both kinds of step in one process and takes the median of the rounds' ratios:
  same dtype, both channels_last, both eager or both compiled. `train` sets LSQ against float,
  `brevitas` and `pt2e` the same job of other toolkits, `mixture` the step of a mixture search,
  `asga` its step against that of the plain mixture search.
- `kernel` quantizes one tensor by several means; `job` is a search, a quantization, or the whole
  command `bitscape compress`; `growth` scores networks, images and widths that grow; `allocate`
  chooses bits from given scores.
- Peak memory is the highest resident size less that after the imports: of a job, or of three eager
  steps with the default allocator, each in a process of its own. Only Linux with glibc tells it.
- "freed memory kept": by default large tensors go back to the system and their pages are faulted in
  again every step, which costs the quantized network more, as it makes more tensors. The commands
  of bitscape tell glibc to keep freed memory, and so do most runs here.

Other toolkits and numba are best installed without their dependencies, in an environment of their
own that sees the packages of this one; where one is missing, its runs are left out. `--only` takes
the runs whose label holds the text, such as "train mobilenetv2_tfslim bfloat16 compiled";
`--images` is how many the jobs get, fewer for a quick look.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch

from benchmarks.common import RESULTS, record
from benchmarks.peer import PEER_PACKAGES, peer_missing
from benchmarks.speed_jobs import (
    ALLOCATION,
    BASE,
    GROWTH,
    NETWORKS,
    PEER_IMAGES,
    measure_allocation,
    measure_growth,
    measure_job,
)
from benchmarks.speed_kernels import DTYPES_OF, SHAPE, measure_kernel
from benchmarks.speed_peers import PEER_DTYPES
from benchmarks.speed_steps import COMPARED, DTYPES, WIDTHS, measure_steps
from bitscape.cli.memory import keep_freed_memory
from bitscape.report.records import missing, read_runs

NAME = "speed"
KEYS = ("method", "network", "variant", "dtype", "settings", "threads")
BATCH = {"resnet20": 128, "mobilenetv2_tfslim": 8, "vit_tiny": 4}
SEARCH_BATCH = {"resnet20": 128, "mobilenetv2_tfslim": 16}
IMAGES = 256

KEPT = "glibc, freed memory kept"
ALLOCATORS = ("default", KEPT)
OWN = {"process": "own"}

PACKAGES = {
    "brevitas": ("brevitas",),
    "pt2e": ("torchao",),
    "numba": ("numba",),
    "mct": PEER_PACKAGES,
}
"""Method or variant of a run -> the packages that it needs beside our own."""

MEASURES = {
    **dict.fromkeys(COMPARED, measure_steps),
    "kernel": measure_kernel,
    "job": measure_job,
    "growth": measure_growth,
    "allocate": measure_allocation,
}
"""Method of a run -> what measures it, from the run and the rounds of a median."""


def wanted(images: int = IMAGES) -> Iterator[dict[str, Any]]:
    """Every run; `images` are those of a job."""
    yield planned("allocate", "", ALLOCATION)
    yield from ratios()
    for by, dtypes in DTYPES_OF.items():
        settings = {"shape": " ".join(map(str, SHAPE)), "allocator": KEPT}
        yield from (planned("kernel", by, settings, dtype=dtype) for dtype in dtypes)
    for along, values in GROWTH.items():
        for value in values:
            yield planned("growth", along, {**BASE, along: value, "allocator": KEPT})
    settings = {"images": PEER_IMAGES, "allocator": KEPT}
    for job in ("fisher and quantize, 3 widths", "mct"):
        yield planned("job", job, settings, network="resnet20")
    settings = {"images": images, "allocator": KEPT}
    kinds = (("fisher", 1), ("quantize", 1), ("compress", 1), ("compress", 2))
    for network, (job, threads) in product(NETWORKS, kinds):
        yield planned("job", job, settings, threads, network=network)


def ratios() -> Iterator[dict[str, Any]]:
    """Runs that set one kind of step against another."""
    trained = [("train", *how, DTYPES) for how in product(("eager", "compiled"), ALLOCATORS)]
    peers = [(peer, "eager", KEPT, dtypes) for peer, dtypes in PEER_DTYPES.items()]
    for network, (method, mode, allocator, dtypes) in product(BATCH, trained + peers):
        shared = {"bits": "w4a4", "batch_size": BATCH[network], "allocator": allocator}
        for dtype in dtypes:
            yield planned(method, mode, {**shared, **OWN}, network=network, dtype=dtype)
    searches = (("mixture", "eager"), ("asga", "eager"), ("mixture", "compiled"))
    for network, (method, mode), allocator in product(SEARCH_BATCH, searches, ALLOCATORS):
        batch = {"widths": " ".join(map(str, WIDTHS)), "batch_size": SEARCH_BATCH[network]}
        settings = {**batch, "allocator": allocator, **OWN}
        yield planned(method, mode, settings, network=network, dtype="float32")


def planned(
    method: str, variant: str, settings: Mapping[str, Any], threads: int = 1, **where: str
) -> dict[str, Any]:
    """A run before it is done."""
    return {
        "method": method,
        "variant": variant,
        "settings": settings,
        "threads": threads,
        **where,
    }


def label(run: dict[str, Any]) -> str:
    """What `--only` looks into."""
    words = [run[key] for key in ("method", "network", "dtype", "variant") if run.get(key)]
    kept = ["kept"] if run["settings"].get("allocator") == KEPT else []
    return " ".join([*words, *kept, f"threads={run['threads']}"])


def obstacle(run: dict[str, Any]) -> str | None:
    """Why the run cannot be done here; None if it can. MCT, which is slow to import, then is."""
    compiler = os.environ.get("CXX", "g++")
    if run["variant"] in ("compiled", "torch.compile") and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler!r} is not there"
    if run["variant"] == "mct":
        return peer_missing()
    lacking = [name for name in packages(run) if importlib.util.find_spec(name) is None]
    return f"{lacking[0]} is not installed" if lacking else None


def packages(run: dict[str, Any]) -> tuple[str, ...]:
    """What the run needs beside our own packages."""
    return PACKAGES.get(run["method"], PACKAGES.get(run["variant"], ()))


def measured(run: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Do one run and return its fields."""
    before = os.getloadavg()[0]
    found = MEASURES[run["method"]](run, rounds)
    outer = {"process_s": "search_s", "peak_bytes": "peak_bytes"}
    fields = {field: found.pop(name) for name, field in outer.items() if name in found}
    if needed := packages(run):
        found["peer_versions"] = {name: importlib.metadata.version(name) for name in needed}
    extra = {**found, "load_average": [round(before, 2), round(os.getloadavg()[0], 2)]}
    return {**run, **fields, "clock": "process", "extra": extra}


def do(run: dict[str, Any], rounds: int) -> None:
    """Do one run and write it down, or say why not; what a new process starts with."""
    if (reason := obstacle(run)) is not None:
        print(f"left out: {label(run)}: {reason}", flush=True)
        return
    torch.set_num_threads(run["threads"])
    if run["settings"].get("allocator") == KEPT and not keep_freed_memory():
        raise OSError("mallopt refused; freed memory can be kept with glibc alone")
    record(NAME, measured(run, rounds))


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", help="text in a run's label; may be repeated")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of a median")
    parser.add_argument("--images", type=int, default=IMAGES, help="images of a job")
    options = parser.parse_args()
    # Start-up is that of a first run: nothing that was compiled before is used.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    runs = [
        run
        for run in wanted(options.images)
        if any(text in label(run) for text in options.only or [""])
    ]
    failed = []
    for run in map(dict, missing(read_runs(RESULTS / f"{NAME}.jsonl"), runs, KEYS)):
        spawned = multiprocessing.get_context("spawn")
        process = spawned.Process(target=do, args=(run, options.rounds))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(f"{label(run)}: its process ended with {process.exitcode}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
