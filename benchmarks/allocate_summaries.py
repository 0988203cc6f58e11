"""The table of `allocate`: median and largest time, and largest gap, of the instances of each kind and size."""

import statistics
from collections.abc import Sequence

from benchmarks.summaries_common import Run, groups


def allocate(runs: Sequence[Run]) -> str:
    """One row for each kind of costs and size."""
    head = ["costs", "layers", "pairs", "caps", "CPU seconds, median", "largest", "proven best", "largest gap"]
    lines = [head, ["---", *["---:"] * 7]]
    for (network, _), group in groups(runs, ("network", "settings")).items():
        settings, seconds = group[0]["settings"], [run["search_s"] for run in group]
        gaps = [run["extra"]["gap"] for run in group]
        size = [str(settings.get(name, "")) for name in ("layers", "pairs", "caps")]
        times = [f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"]
        lines.append([network, *size, *times, f"{gaps.count(0.0)} of {len(gaps)}", f"{max(gaps):.2%}" if max(gaps) else "0"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
