import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.overview import overview
from bitscape.report.records import read_runs


def run(method: str, top1: float, seed: int = 0, **fields: Any) -> dict[str, Any]:
    return {"network": "net", "target": "cifar10", "method": method, "top1": top1, "seed": seed, **fields}


def untrained(method: str, top1: float, seed: int = 0, bits: int = 8, **fields: Any) -> dict[str, Any]:
    return run(method, top1, seed, settings={"activation_bits": bits}, **fields)


def trained(method: str, variant: str, top1: float, seed: int, budget: str = "w2a3") -> dict[str, Any]:
    return run(method, top1, seed, variant=variant, settings={"budget": budget}, float_top1=91.0)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    files = {
        "ptq-imagenet": [
            untrained("uniform", 60.0, proxy=None),
            untrained("uniform", 10.0, proxy="cifar10:256"),
            untrained("float", 80.0, proxy=None),
            untrained("fisher", 70.0, proxy=None),
            untrained("fisher", 75.0, bits=6, proxy=None),
        ],
        "qat-cifar10": [
            trained("uniform", "one width", 80.0, 0),
            trained("uniform", "one width", 81.0, 1),
            trained("uniform", "two widths", 83.0, 0),
            trained("uniform", "two widths", 84.0, 1),
            trained("uniform", "w9", 99.0, 0),
            trained("fisher", "for training", 84.0, 0),
            trained("fisher", "for training", 85.0, 1),
            trained("fisher", "not for training", 99.0, 0),
            trained("random", "", 50.0, 0),
            trained("fisher", "for training", 90.0, 0, budget="w4a4"),
        ],
    }
    for name, runs in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in runs))
    assert len(read_runs(tmp_path / "qat-cifar10.jsonl")) == 10
    return tmp_path


def test_each_budget_has_a_line_with_the_best_uniform_row_that_has_most_seeds(results: Path):
    _, _, first, wide, narrow = overview(results).splitlines()
    assert (
        first
        == "| net, ImageNet, **not trained**, bytes of 4-bit weights | 80.00 | 60.00 | 70.00 | - | +10.00, one pair: no interval | 1 |"
    )
    assert wide == "| net, cifar10, **trained**, BitOps of W4A4 | 91.00 | - | 90.00 | - | no seed in common | 1 |"
    # Both pairs differ by exactly one point, so that the interval has no width.
    values = "91.00 | 83.50 ± 0.71 | 84.50 ± 0.71 | 50.00 | +1.00 [+1.00, +1.00] | 2"
    assert narrow == f"| net, cifar10, **trained**, BitOps of W2A3 | {values} |"


def test_without_results_it_says_so(tmp_path: Path):
    assert overview(tmp_path) == "no runs yet"
