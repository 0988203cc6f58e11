"""tasks: networks of many kinds through the public verbs, without training: search, quantize, evaluate, export.

    python -m benchmarks.tasks [--network resnet20 ...] [--threads 1]

Every policy is found on 256 samples without labels (64 for large images and transformers), its network is repaired on the same ones
and measured on others. Two budgets: the bytes of 4-bit weights in every layer beside 8-bit activations, and the
BitOps of 6/6. The fisher policy of the first budget is exported to packed, ONNX and OpenVINO files, which are checked.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import bitscape as bs
from benchmarks.common import bits_of, do_missing, networks_parser
from benchmarks.subjects import Subject, described, subject, value

NAME = "tasks"
KEYS = ("network", "method", "variant", "seed")
BUDGETS: dict[str, dict[str, Any]] = {
    "4bit": {"budget": "weight_bytes=4bit", "candidates": tuple(bs.LayerBits(bits, 8) for bits in (2, 3, 4, 5, 6, 8))},
    "w6a6": {"budget": "bitops=w6a6"},
}
"""Variant -> what `bs.search` is given."""
FILES = ("net.safetensors", "net.onnx", "net.xml")
NETWORKS = (
    "resnet20",
    "cct4",
    "text_direction",
    "rotation",
    "same_class",
    "text_detector",
    "mobilenetv2_tfslim",
    "yolox_nano",
)
METHODS = [
    ("float", None, 0),
    ("fisher", "4bit", 0),
    ("uniform", "4bit", 0),
    ("files", "4bit", 0),
    *((method, "w6a6", 0) for method in ("fisher", "uniform")),
    *(("random", variant, seed) for seed in range(5) for variant in BUDGETS),
]
"""Method, budget and seed."""


def wanted(networks: Sequence[str] = NETWORKS) -> Iterator[dict[str, Any]]:
    """Every run, random policies last; "files" are those of the fisher policy at the first budget."""
    for (method, variant, seed), network in itertools.product(METHODS, networks):
        yield {"network": network, "method": method, "variant": variant, "seed": seed}


def quantized(about: Subject, run: Mapping[str, Any]) -> tuple[bs.SearchResult, nn.Module, dict[str, float]]:
    """Search and quantize; return the seconds of process time that both took."""
    started = time.process_time()
    method = "fisher" if run["method"] == "files" else run["method"]
    asked = BUDGETS[run["variant"]]
    result = bs.search(about.model, about.calibration, method=method, task=about.task, count=about.images, seed=run["seed"], **asked)
    searched = time.process_time()
    network = bs.quantize(about.model, result.policy, about.calibration, count=about.images)
    return result, network, {"search_s": searched - started, "quantize_s": time.process_time() - searched}


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Do one run and return its fields."""
    about = subject(run["network"])
    shared = {
        **run,
        **described(run["network"]),
        "settings": {"images": about.images},
    }
    if run["method"] == "float":
        return {**shared, "value": shared["float_value"]}
    result, network, seconds = quantized(about, run)
    shared |= {
        "policy": bits_of(result.policy),
        "budget": dict(result.policy.provenance["budget"]),
        "cost": dict(result.policy.cost),
        "search_s": seconds["search_s"],
    }
    if run["method"] == "files":
        with TemporaryDirectory() as folder:
            return {**shared, "extra": {name: exported(network, Path(folder) / name, about) for name in FILES}}
    return {**shared, "value": value(about, network), "extra": {"quantize_s": seconds["quantize_s"]}}


def exported(network: nn.Module, path: Path, about: Subject) -> dict[str, Any]:
    """Write one file; what its parity is, or why it was refused."""
    try:
        report = bs.export(network, path, about.calibration, count=64)
    except bs.BitscapeError as error:
        return {"refused": str(error)}
    exact = {name: agreement.difference for name, agreement in report.exact.items()}
    parity = None if report.parity is None else {"codes": report.parity.codes, "differing": report.parity.differing}
    return {"bytes": report.file_bytes, "runtime": report.runtime, "parity": parity, "relative_error": exact}


def main() -> None:
    """Do the runs that the results file lacks."""
    parser = networks_parser(__doc__, NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    do_missing(NAME, KEYS, wanted(options.network or NETWORKS), measure)


if __name__ == "__main__":
    main()
