import json
from pathlib import Path
from typing import Any

from benchmarks.overview import overview


def run(method: str, value: float, network: str = "net", variant: str | None = "4bit") -> dict[str, Any]:
    return {"network": network, "method": method, "variant": variant, "metric": "top1", "float_value": 90.0, "value": value}


def test_a_network_with_a_control_has_a_line(tmp_path: Path):
    runs = [
        run("float", 90.0, variant=None),
        run("fisher", 89.5),
        run("fisher", 12.0, variant="w6a6"),
        run("random", 80.0),
        run("random", 85.0),
        run("uniform", 88.25),
        run("fisher", 70.0, network="without control"),
        run("fisher", 60.0, network="second"),
        run("uniform", 61.0, network="second"),
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in runs))
    assert overview(tmp_path).splitlines()[2:] == [
        "| net | top-1, % | 90.00 | 89.50 | 88.25 | 82.50 (n=2) |",
        "| second | top-1, % | 90.00 | 60.00 | 61.00 | - |",
    ]


def test_without_results_it_says_so(tmp_path: Path):
    assert overview(tmp_path) == "no runs yet"
