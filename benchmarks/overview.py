"""The short table of the README: searched, uniform and random bits within the bytes of 4-bit weights, a line a network."""

import statistics
from pathlib import Path

from benchmarks.summaries_common import groups
from bitscape.report.records import read_runs

BUDGET = "4bit"
HEADINGS = ("network", "metric", "float", "searched: `fisher`", "uniform 4 bits", "random bits, mean")
METRICS = {
    "top1": "top-1, %",
    "accuracy": "accuracy, %",
    "mean_absolute_degrees": "error, degrees (less is better)",
    "ap_against_float": "AP against float, %",
    "hmean": "h-mean of boxes, %",
}
"""Metric of a run -> how the table calls it."""


def overview(results: Path) -> str:
    """A markdown table from the runs of the benchmark tasks that have a uniform control; "no runs yet" without any."""
    measured = [run for run in read_runs(results / "tasks.jsonl") if run.get("variant") == BUDGET and "value" in run]
    lines = []
    for (network,), group in groups(measured, ("network",)).items():
        value = {run["method"]: run["value"] for run in group}
        if value.keys() < {"fisher", "uniform"}:
            continue
        randoms = [run["value"] for run in group if run["method"] == "random"]
        mean = f"{statistics.mean(randoms):.2f} (n={len(randoms)})" if randoms else "-"
        numbers = [f"{number:.2f}" for number in (group[0]["float_value"], value["fisher"], value["uniform"])]
        lines.append([network, METRICS[group[0]["metric"]], *numbers, mean])
    rules = ["---", "---", *["---:"] * 4]
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEADINGS, rules, *lines]) if lines else "no runs yet"
