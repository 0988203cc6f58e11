"""workers: images a second of training and of mixture searches, by one process and by several that torchrun started, at one batch size.

    python -m benchmarks.workers [--only asga] [--rounds 3]

Strong scaling: all processes share each batch (gloo and one thread a process on CPUs, nccl and one GPU a process where there are several).
One process and several are started in turn, each `--rounds` times, by the same launcher. A step goes from its beginning to that of the
next, so that images, gradients, messages and the optimizer are all in it; a start gives the median of its steps after the first ones. A
second ratio compares processor time, one process's against that of the busiest of several: how the work itself divides, without waiting.

All processes of all rounds must end with the same weights, or scores and policy, to the last bit; one process and several need not. Runs
that do not are an error, and no row. How many cores other programs kept busy meanwhile stands beside each row.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitscape as bs
from benchmarks.common import DATA, RESULTS, record
from benchmarks.speed_steps import quantized
from bitscape.cli.memory import keep_freed_memory
from bitscape.cli.network import pick_device
from bitscape.data.samples import Samples
from bitscape.engine import Batch, Step, StepRecord, StepSettings
from bitscape.engine.workers import rank
from bitscape.report.records import missing, read_runs
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.mixed_network import Mixed
from bitscape.searches.mixture_search import MixtureSettings, mixture_search
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import ProxyTask
from bitscape.steps import Plain
from recipes.networks import WEIGHTS, load

NAME = "workers"
KEYS = ("network", "method", "variant", "settings", "seed")
NETWORK = "resnet20"
BATCH_SIZE, STEPS, WARM_UP = 128, 9, 2
TRAINING: dict[str, Step | StepSettings] = {"plain": Plain(), "saq": bs.Saq(rho=0.02)}
SEARCHES: dict[str, type[MixtureSettings]] = {"differentiable": Differentiable, "asga": bs.Asga}
ROOT = Path(__file__).parents[1]
Moments = list[tuple[float, float]]
Seen = Mapping[str, Any]
"""What one process notes: `same`, a hash of its result, and wall_s and process_s of a step."""


def wanted(processes: int = 2, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Every run: so many processes against one."""
    settings = {"processes": processes, "batch_size": BATCH_SIZE, "device": device}
    for method in (*TRAINING, *SEARCHES):
        variant = "mixture search" if method in SEARCHES else "training, w4a4"
        yield {"network": NETWORK, "method": method, "variant": variant, "settings": settings, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class Clocked:
    """A step that notes when it begins, in wall and process seconds."""

    step: Step
    moments: Moments

    def __call__(self, model: torch.nn.Module, batch: Batch) -> StepRecord:
        """Note the time, then do the step."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.moments.append((time.perf_counter(), time.process_time()))
        return self.step(model, batch)


def trained(method: str, device: torch.device, moments: Moments) -> Mapping[str, Tensor]:
    """Train a quantized network; what its weights became."""
    data, normalization = bs.load_dataset(str(DATA / "cifar10_train.parquet"), limit=STEPS * BATCH_SIZE), WEIGHTS[NETWORK].normalization
    batches = bs.Batches(dataset=data, normalization=normalization, batch_size=BATCH_SIZE, shuffle=True, augment="crop-flip")
    network = quantized(NETWORK, normalization.apply(data.images[:BATCH_SIZE])).to(device)
    given = TRAINING[method]
    step = Clocked(step=given if callable(given) else given.build(), moments=moments)
    bs.train(network, batches, task="classes", step=step, optimizer=bs.Sgd(lr=0.01), epochs=1)
    return network.state_dict()


def searched(method: str, device: torch.device, moments: Moments) -> Mapping[str, Tensor]:
    """Search on images with their labels; the scores and the bits."""
    settings = SEARCHES[method](epochs=1, batch_size=BATCH_SIZE)

    def clocked(mixed: Mixed, learned: ProxyTask) -> Step:
        return Clocked(step=settings.make_step(mixed, learned), moments=moments)

    data = bs.load_dataset(str(DATA / "cifar10_train.parquet"), limit=STEPS * BATCH_SIZE)
    images = WEIGHTS[NETWORK].normalization.apply(data.images).to(device)
    problem = SearchProblem.of(model=load(NETWORK, DATA).to(device), samples=Samples.of(images, data.labels), budget="bitops=w4a4")
    result = mixture_search(problem, settings, clocked)
    assert result.scores is not None
    bits = [[layer.weight, layer.activation] for layer in result.policy.layers.values()]
    return {"scores": torch.tensor(result.scores.values), "bits": torch.tensor(bits)}


def digest(result: Mapping[str, Tensor]) -> str:
    """Short hash of names and bits."""
    parts = (name.encode() + tensor.cpu().contiguous().numpy().tobytes() for name, tensor in sorted(result.items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def step_seconds(moments: Moments) -> dict[str, float]:
    """Medians of the time between beginnings, the first ones left out."""
    steps = [
        [after - before for before, after in zip(*pair, strict=True)]
        for pair in zip(moments[WARM_UP:], moments[WARM_UP + 1 :], strict=False)
    ]
    return {name: statistics.median(taken) for name, taken in zip(("wall_s", "process_s"), zip(*steps, strict=True), strict=True)}


def work(method: str, device: str, folder: Path) -> None:
    """What each process does: train or search, and note how long steps took and what came out."""
    torch.set_num_threads(1)
    keep_freed_memory()
    moments: Moments = []
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    result = (searched if method in SEARCHES else trained)(method, chosen, moments)
    (folder / f"{rank()}.json").write_text(json.dumps({"same": digest(result), **step_seconds(moments)}))


def launched(run: Seen, processes: int) -> list[Seen]:
    """Start so many processes with torchrun and return what each of them noted."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "benchmarks.workers"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launcher, "--work", run["method"], run["settings"]["device"], folder]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{run['method']}, {processes} processes: {done.stderr}")
        return [json.loads((Path(folder) / f"{at}.json").read_text()) for at in range(processes)]


def compared(alone: Sequence[Sequence[Seen]], together: Sequence[Sequence[Seen]], images: int) -> dict[str, Any]:
    """Speeds and ratios over the rounds, each a list of what every process noted. Raises SystemExit where results are not the same."""
    found: dict[str, Any] = {}
    for name, rounds in (("one", alone), ("several", together)):
        if len({seen["same"] for each in rounds for seen in each}) > 1:
            raise SystemExit(f"processes or rounds of {name} end with other bits: {rounds}")
        found[f"{name}_images_per_s"] = round(images / statistics.median(_slowest(each, "wall_s") for each in rounds), 1)
    ratios = {
        clock: [_slowest(one, clock) / _slowest(more, clock) for one, more in zip(alone, together, strict=True)]
        for clock in ("wall_s", "process_s")
    }
    for clock, name in (("wall_s", "ratio"), ("process_s", "process_ratio")):
        found[name] = round(statistics.median(ratios[clock]), 3)
        found[f"{name}_range"] = [round(edge(ratios[clock]), 3) for edge in (min, max)]
    return {**found, "same_bits": True, "rounds": len(alone)}


def _slowest(seen: Sequence[Seen], clock: str) -> float:
    return max(float(each[clock]) for each in seen)


def busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """Processor time of all programs but this one and its children, over all cores, since the machine started; only Linux tells it."""
    ticks = list(map(int, stat.read_text().split(maxsplit=9)[1:9]))
    idle, own = sum(ticks[3:5]), os.times()
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - (own.user + own.system + own.children_user + own.children_system)


def measure(run: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Start one process and several in turn, the first of a round by turns too."""
    several, begun, busy = run["settings"]["processes"], time.perf_counter(), busy_seconds()
    seen: dict[int, list[list[Seen]]] = {1: [], several: []}
    for at in range(rounds):
        for processes in sorted(seen, reverse=bool(at % 2)):
            seen[processes].append(launched(run, processes))
    others = round((busy_seconds() - busy) / (time.perf_counter() - begun), 2)
    return {**run, "clock": "wall", "extra": {**compared(seen[1], seen[several], BATCH_SIZE), "cores_of_others": others}}


def main() -> None:
    """Do the runs that the results file lacks."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*TRAINING, *SEARCHES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)  # what torchrun starts
    options = parser.parse_args()
    if options.work:
        method, device, folder = options.work
        work(method, device, Path(folder))
        return
    torch.set_num_threads(1)
    runs = [run for run in (wanted(gpus, "cuda") if gpus > 1 else wanted()) if run["method"] in (options.only or [run["method"]])]
    for run in missing(read_runs(RESULTS / f"{NAME}.jsonl"), runs, KEYS):
        record(NAME, measure(dict(run), options.rounds))


if __name__ == "__main__":
    main()
