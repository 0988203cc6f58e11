"""The table of the way from `pip install` to the first policy: seconds of each step, and what was installed."""

import statistics
from collections.abc import Sequence

from benchmarks.first_policy import COUNTED
from benchmarks.summaries_common import Run


def first_policy(runs: Sequence[Run]) -> str:
    """A row for each step, over the runs of one network and Python; above it what was installed, and how busy the machine was."""
    extras = [run["extra"] for run in runs]
    rows = [
        [name, "yes" if name in COUNTED else "", _seconds([extra["steps_s"][name] for extra in extras])] for name in extras[0]["steps_s"]
    ]
    total = ["from nothing to the policy", "sum", _seconds([extra["to_policy_s"] for extra in extras])]
    lines = [["step", "counts", "s"], ["---", "---", "---:"], *rows, total]
    loads = sorted(load for extra in extras for load in extra["load_average"])
    about = f"{_installed(runs[-1])} Load average {loads[0]:.1f} to {loads[-1]:.1f}."
    return about + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def _installed(run: Run) -> str:
    extra, settings = run["extra"], run["settings"]
    sizes = (
        f"environment {extra['environment_mb']:,.0f} MB, of it torch {extra['torch_mb']:,.0f} MB and bitscape {extra['bitscape_mb']:.1f} MB"
    )
    wheel = f"wheel {extra['wheel_kb']:,.0f} kB, {extra['wheel_files']} files"
    cache = "with" if settings["pip_cache"] else "without"
    given = f"Python {settings['python']}, {settings['images']} images, budget {settings['budget']}, pip {cache} its cache"
    return f"{given}: {len(extra['installed'])} packages, torch {extra['installed']['torch']}; {sizes}; {wheel}."
