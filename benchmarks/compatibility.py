"""compatibility: families of networks, each taken through the command line from the float network to files of runtimes.

    python -m benchmarks.compatibility [--network timm:resnet18]

Networks of timm, torchvision and Hugging Face, with random weights, which is enough to see what works: their cost is measured, bits are
searched within the bytes of uniform 4-bit weights, one step is trained at these bits, and the network goes into a packed file, an ONNX file
and an OpenVINO file. Every file is checked as the commands check it: packed weights give the same outputs, runtimes the same codes as exact
integers, layer by layer. A part ends as "works", as "refused" with an error that says why, or as "fails" where the error is not one of
bitscape. Each network has a process of its own, with a time limit. Where timm, torchvision or transformers is missing, its networks are
skipped.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import bitscape as bs
from benchmarks.common import RESULTS, record
from benchmarks.zoo import ENTRIES, IMAGES, build, images
from bitscape.cli.app import commands
from bitscape.cost.budget import parse_budget
from bitscape.cost.layers import measure as measure_layers
from bitscape.cost.policy_cost import policy_cost
from bitscape.models.find import save_weights
from bitscape.models.prepare import as_prepared
from bitscape.report.records import missing, read_runs

NAME = "compatibility"
KEYS = ("network", "method", "seed")
PACKAGES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}
BUDGET, LIMIT_S = "weight_bytes=w4", 1200
PARTS = ("build", "cost", "search", "train", "packed", "onnx", "openvino")
NEEDED = PARTS[:3]
"""Parts without which there are no others."""
WORKS, REFUSED, FAILS = "works", "refused", "fails"


def wanted(networks: tuple[str, ...] = tuple(ENTRIES)) -> Iterator[dict[str, Any]]:
    """Every run of the benchmark."""
    yield from ({"network": name, "method": "command line", "seed": 0} for name in networks)


class Journey:
    """What one network goes through, part after part, in a folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.size = name, folder, ENTRIES[name].size

    def build(self) -> Mapping[str, Any]:
        """Build the network; save its weights, and images."""
        self.found, self.network = build(self.name, self.folder / "hub")
        save_weights(self.network.state_dict(), self.folder / "weights.safetensors")
        np.savez(self.folder / "images.npz", images=images(self.size).permute(0, 2, 3, 1).numpy(), labels=np.arange(IMAGES))
        return {"parameters": sum(parameter.numel() for parameter in self.network.parameters())}

    def cost(self) -> Mapping[str, Any]:
        """Count layers and multiplications, and those that bits do not reach."""
        self.layers = measure_layers(self.network, (3, self.size, self.size))
        counted = self.layers.covered_macs / self.layers.total_macs
        return {"layers": len(self.layers.layers), "never_called": len(self.layers.uncalled), "counted_macs": counted}

    def search(self) -> Mapping[str, Any]:
        """Search among the widths that ONNX files store."""
        pins = [word for name in self.layers.ends for word in ("--pin", f"{name}=8/8")]
        offered = ("--budget", BUDGET, "--candidates", "w=2,4,8;a=8", *pins)
        self._run("search", *self._data("--data"), *offered, "--images", IMAGES, "--out", self.folder / "policy.json")
        policy = bs.Policy.load(self.folder / "policy.json")
        budget = parse_budget(BUDGET, self.layers, dict.fromkeys(self.layers.ends, bs.LayerBits(8, 8)))
        if exceeded := budget.exceeded(self.layers, policy):
            raise RuntimeError(f"the policy costs {exceeded}, over {budget}")
        return {"mean_weight_bits": policy_cost(self.layers, policy)["mean_weight_bits"]}

    def train(self) -> Mapping[str, Any]:
        """Take one step at the policy's bits; every layer's weight must have moved."""
        recipe = ("--epochs", 1, "--batch-size", IMAGES, "--lr", 0.01, "--out", self.folder / "run")
        self._run("train", *self._data("--data"), "--policy", self.folder / "policy.json", *recipe)
        before, after = as_prepared(self.network).state_dict(), load_file(self.folder / "run" / "model.safetensors")
        still = [name for name in self.layers.by_name if torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])]
        if still:
            raise RuntimeError(f"weights of {len(still)} layers are as before: {', '.join(still[:3])}")
        epoch = json.loads((self.folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        return {"loss": epoch["loss"], "gradient_norm": epoch["gradient_norm"]}

    def packed(self) -> Mapping[str, Any]:
        """Write the packed file, which the command loads again and compares."""
        return self._export("packed", "packed.safetensors")

    def onnx(self) -> Mapping[str, Any]:
        """Write the ONNX file, which the command compares with exact integers in ONNX Runtime."""
        return self._export("onnx", "network.onnx")

    def openvino(self) -> Mapping[str, Any]:
        """Write the OpenVINO file, which the command compares with exact integers."""
        return self._export("openvino", "openvino.xml")

    def _export(self, kind: str, name: str) -> Mapping[str, Any]:
        given = ("--policy", self.folder / "policy.json", *self._data("--calibration"), "--calibration-images", IMAGES)
        said = self._run("export", kind, *given, "--out", self.folder / name)
        written = sum(path.stat().st_size for path in self.folder.glob(f"{Path(name).stem}.*"))  # OpenVINO writes two files
        found = re.search(r"weights of (\d+) of", said)
        integers = {} if found is None else {"integer_layers": int(found[1])}
        return {"file_bytes": written, **integers, "checked": [line for line in said.splitlines() if "exact" in line]}

    def _data(self, option: str) -> tuple[object, ...]:
        tells = self.name.partition(":")[0] in ("timm", "hf")
        return (option, self.folder / "images.npz", "--input-size", self.size, "--normalize", "model" if tells else "imagenet")

    def _run(self, *arguments: object) -> str:
        """Run a command in this process and return what it printed."""
        parts = 2 if arguments[0] == "export" else 1
        source = ("--model", self.found, "--weights", self.folder / "weights.safetensors")
        result = CliRunner().invoke(commands, [str(argument) for argument in (*arguments[:parts], *source, *arguments[parts:])])
        if result.exception is not None:
            raise result.exception
        return result.stdout


def travel(name: str) -> Iterator[dict[str, Any]]:
    """Go through all parts; one that ends badly does not keep the later ones from being tried, unless they need it."""
    with tempfile.TemporaryDirectory() as folder:
        journey = Journey(name, Path(folder))
        for part in PARTS:
            started = time.perf_counter()
            found = _outcome(getattr(journey, part), f"{folder}/")
            yield {"part": part, **found, "seconds": time.perf_counter() - started}
            if found["outcome"] != WORKS and part in NEEDED:
                return


def _outcome(part: Callable[[], Mapping[str, Any]], folder: str) -> dict[str, Any]:
    try:
        return {"outcome": WORKS, **part()}
    except bs.BitscapeError as error:
        return {"outcome": REFUSED, "reason": str(error).replace(folder, "")}
    except Exception as error:
        return {"outcome": FAILS, "reason": f"{type(error).__name__}: {error}".replace(folder, "")}


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Take one network through a process of its own; where that ends, or lasts too long, what was not reached has failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compatibility", "--travel", run["network"], "--to", str(results)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
            ended = f"the process ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {LIMIT_S} s"
        parts = {found.pop("part"): found for found in map(json.loads, results.read_text().splitlines())}
    if not _stopped_on_purpose(parts):
        parts |= {part: {"outcome": FAILS, "reason": ended} for part in PARTS if part not in parts}
    entry = ENTRIES[run["network"]]
    return {**run, "clock": "wall", "extra": {"family": entry.family, "size": entry.size, "parts": parts, "versions": _versions()}}


def _stopped_on_purpose(parts: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(name in parts and parts[name]["outcome"] != WORKS for name in NEEDED)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        name: version(name) for name in ("timm", "torchvision", "transformers", "onnxruntime", "openvino") if importlib.util.find_spec(name)
    }


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=list(ENTRIES), metavar="NAME")
    parser.add_argument("--travel", choices=list(ENTRIES), help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, default=Path("/dev/stdout"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.travel:
        with options.to.open("a") as results:
            for found in travel(options.travel):
                print(json.dumps(found), file=results, flush=True)
        return
    runs = list(missing(read_runs(RESULTS / f"{NAME}.jsonl"), wanted(tuple(options.network or ENTRIES)), KEYS))
    for package in {PACKAGES[run["network"].partition(":")[0]] for run in runs}:
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its networks are skipped", flush=True)
            runs = [run for run in runs if PACKAGES[run["network"].partition(":")[0]] != package]
    for run in runs:
        record(NAME, measure(run))


if __name__ == "__main__":
    main()
