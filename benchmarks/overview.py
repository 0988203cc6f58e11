"""The short table of the README: uniform, searched and random bits at one budget, a line for each network and budget."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.summaries_common import Run, groups, paired
from bitscape.report.records import read_runs

HEADINGS = ("network, budget", "float", "uniform bits", "searched: fisher", "random bits", "searched - uniform, points [95 %]", "seeds")


def overview(results: Path) -> str:
    """A markdown table of top-1 in percent, from the results of ptq-imagenet and qat-cifar10; "no runs yet" without any."""
    lines = [*_untrained(read_runs(results / "ptq-imagenet.jsonl")), *_trained(read_runs(results / "qat-cifar10.jsonl"))]
    rules = ["---", *["---:"] * 4, "---", "---:"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEADINGS, rules, *lines]) if lines else "no runs yet"


def _untrained(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Scores, ranges and repair on the target's images; activations at 8 bits."""
    shown = [run for run in runs if run["settings"] == {"activation_bits": 8} and run.get("proxy") is None]
    for (network,), group in groups(shown, ("network",)).items():
        float_top1 = next(run["top1"] for run in group if run["method"] == "float")
        yield _line(f"{network}, ImageNet, **not trained**, bytes of 4-bit weights", float_top1, group, group)


def _trained(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Uniform is the best of the uniform policies within the budget; the search knows that training follows."""
    for (budget,), group in sorted(groups(runs, ("settings.budget",)).items(), reverse=True):
        uniform = groups([run for run in group if run["method"] == "uniform"], ("variant",)).values()
        best = max(uniform, key=lambda found: (len(found), statistics.fmean(run["top1"] for run in found)), default=[])
        searched = [run for run in group if run["method"] != "uniform" and run.get("variant") != "not for training"]
        title = f"{group[0]['network']}, {group[0]['target']}, **trained**, BitOps of {budget.upper()}"
        yield _line(title, group[0]["float_top1"], best, searched)


def _line(title: str, top1: float, uniform: Sequence[Run], others: Sequence[Run]) -> list[str]:
    own, searched, random = (
        {run["seed"]: run["top1"] for run in runs if run["method"] == method}
        for runs, method in ((uniform, "uniform"), (others, "fisher"), (others, "random"))
    )
    values = [_mean(list(found.values())) for found in (own, searched, random)]
    return [title, f"{top1:.2f}", *values, paired(searched, own), str(len(searched))]


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values) or "-"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
