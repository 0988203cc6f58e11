"""Small files of every kind that a report reads, of one network of four layers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitscape.cost.latency import LatencyTable
from bitscape.cost.layers import NetworkProfile, measure
from bitscape.measure.analysis.layers import LayerNoise
from bitscape.measure.analysis.outputs import OutputError
from bitscape.measure.analysis.result import Analysis, LayerAnalysis
from bitscape.measure.analysis.tensors import TensorNoise
from bitscape.policy import LayerBits, Policy, fingerprint
from bitscape.report.documents import EvaluationDocument
from bitscape.searches.scores import ScoreTable

CAPS = {"bitops": 20_000, "weight_bytes": 400}
LAYERS = ("first", "second", "third", "last")


class Net(nn.Module):
    """Four layers; `second` is called after `third`, so that call order is another one than that of registration."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of images (n, 1, 4, 4)."""
        return self.last(self.second(self.third(self.first(x))).mean((2, 3)))


def network() -> NetworkProfile:
    """MACs: first 64, third 384, second 384, last 12. Weights: 4, 24, 24, 12."""
    return measure(Net(), (1, 4, 4))


def mark() -> str:
    """Fingerprint of the network."""
    return fingerprint(network().shapes)


def policy(second: str = "2/4", third: str = "4/2", **provenance: Any) -> Policy:
    """Bits of the inner layers; the ends have 8/8."""
    pairs = {"first": "8/8", "second": second, "third": third, "last": "8/8"}
    bits = {name: LayerBits(int(text[0]), int(text[2])) for name, text in pairs.items()}
    return Policy(bits, mark(), {"bitops": 11_008, "mean_weight_bits": 4.25}, provenance)


def searched(second: str = "2/4", third: str = "4/2", method: str = "fisher") -> Policy:
    """A policy as a search leaves it."""
    about = {"model": "made:Net", "weights": "net.safetensors", "data": "digits", "images": [16, 1, 4, 4]}
    return policy(second, third, method=method, budget=CAPS, seed=3, version="0.1.0", settings={"images": 16}, for_training=True, **about)


def scores() -> ScoreTable:
    """Of the inner layers at 2/2, 4/4, 2/4, 4/2."""
    pairs = (LayerBits(2, 2), LayerBits(4, 4), LayerBits(2, 4), LayerBits(4, 2))
    return ScoreTable(("second", "third"), pairs, [[1.0, 0.01, 0.125, 0.5], [2.0, 0.02, 0.75, 0.25]], "fisher", 0, mark())


def evaluation(evaluated: str = "float", value: float = 90.0, **changed: Any) -> EvaluationDocument:
    """What `bitscape evaluate --json` leaves."""
    about = {"model": "made:Net", "data": "digits", "metric": "top-1 %", "others": {"loss": 0.5}, "samples": 100}
    costs = {"parameter_bytes": 300.0} if evaluated == "float" else {"weight_bytes": 70.0, "bitops": 11_008.0}
    return EvaluationDocument(**{"format": 1, "evaluated": evaluated, "value": value, "cost": costs, **about, **changed})


def latency(**changed: Any) -> LatencyTable:
    """Flat: 4/8 takes as long as 8/8."""
    layers = {name: {"8/8": 0.5, "4/8": 0.499} for name in LAYERS}
    about = {"runtime": "openvino 1", "machine": "a CPU", "threads": 1, "batch_size": 1, "input_shape": (1, 4, 4), "fingerprint": mark()}
    return LatencyTable(**{**about, "network_ms": 2.5, "float_ms": 9.5, "layers": layers, **changed})


def run(folder: Path, *, top1: float | None = 90.0, seed: int = 0, epochs: int = 2, ended: bool = True, **changed: Any) -> Path:
    """A folder of `bitscape train`; `policy` in `changed` is saved, and other entries replace settings."""
    folder.mkdir()
    saved = changed.pop("policy", None)
    settings = {"epochs": epochs, "seed": seed, "bits": {"first": {}} if saved else {}, "step": {"kind": "Plain"}}
    settings |= {"optimizer": {"kind": "Sgd", "lr": 0.05}, "batches": {"dataset": {"name": "digits train"}, "batch_size": 64, "seed": seed}}
    about = {"format": 1, "settings": {**settings, **changed}, "versions": {"torch": "2.11"}, "device": "cpu", "workers": 1}
    (folder / "run.json").write_text(json.dumps(about))
    validated = {} if top1 is None else {"validation_top1": top1}
    done = epochs if ended else epochs - 1
    records = [{"epoch": at, "loss": 1 / at, "top1": 50.0 + at, **validated} for at in range(1, done + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if saved:
        saved.save(folder / "policy.json")
    return folder


def bench(path: Path, file: str = "net.onnx") -> Path:
    """Figures of float and of one file."""
    row = {
        "file": "float",
        "runtime": "onnxruntime 1",
        "batch_size": 1,
        "file_bytes": 4000,
        "float_layers": 4,
        "cpu_ms": 3.25,
        "wall_ms": 3.5,
    }
    row |= {"cpu_spread": 0.01, "images_per_s": 285.7, "times_faster": 1.0, "images": 100, "top1": 91.0, "agreement": 100.0}
    other = {**row, "file": file, "cpu_ms": 1.625, "file_bytes": 1234, "times_faster": 2.0, "agreement": 98.5}
    about = {"format": 1, "tool": "bitscape", "machine": "a CPU", "threads": 1, "rounds": 5, "input_shape": [1, 4, 4]}
    path.write_text(json.dumps({**about, "rows": [row, other]}))
    return path


def noise(sqnr_db: float | None = 20.0, **changed: Any) -> TensorNoise:
    """Of values from -1 to 3 in 4 bits that reach from -0.5 to 2.5; four are counted, in two bins."""
    counts = (3, *(0 for _ in range(62)), 1)
    about = {"low": -1.0, "high": 3.0, "percentiles": (-1.0, -0.9, 0.5, 2.0, 2.5), "std": 1.0, "kurtosis": 4.5}
    grid = {"bits": 4, "clip_min": -0.5, "clip_max": 2.5, "clipped": 0.25}
    return TensorNoise(**{**about, **grid, "histogram": counts, "sqnr_db": sqnr_db, **changed})


def analysis(*names: str) -> Analysis:
    """Of layers each of which moves the outputs twice as much as the one before."""
    layers = {}
    for row, name in enumerate(names or LAYERS):
        own = LayerNoise(weight=noise(30.0 - row), input=noise(None, bits=8), output_db_by_weight=25.0, output_db_by_input=None)
        error = OutputError(relative_error=0.1 * 2**row, divergence=2.0**row, changed=0.125)
        layers[name] = LayerAnalysis(noise=own, alone=error, others=OutputError(relative_error=0.5, divergence=16.0 - row, changed=0.25))
    whole = OutputError(relative_error=0.75, divergence=16.5, changed=0.5)
    states = {"whole": whole, "weights": whole, "inputs": OutputError(relative_error=0.0, divergence=0.0, changed=0.0)}
    return Analysis(task="classes", samples=32, compared=8, seconds=1.5, fingerprint=mark(), layers=layers, **states)
