"""The tables of `ptq`: policies after the default repair, and what each step of repair gives."""

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.summaries_common import Run, groups, paired

METHODS = ("uniform", "two widths", "random", "local", "fisher", "fisher, refined")
STEPS = (None, "compensate", "tune", "reconstruct")
DEFAULT = "compensate"


def ptq(runs: Sequence[Run]) -> str:
    """One row for each network and budget; then the same after each step of repair."""
    quantized = [run for run in runs if run["variant"] is not None]
    return f"{_methods(quantized)}\n\n{_steps(quantized)}"


def _methods(runs: Sequence[Run]) -> str:
    heads = ["network", "metric", "budget", "float", *METHODS, "fisher, foreign images"]
    rows = [[*heads, "fisher - best uniform"]]
    default = [run for run in runs if run["settings"]["repair"] == DEFAULT]
    for (network, budget), group in groups(default, ("network", "variant")).items():
        own = [run for run in group if run["proxy"] == "own"]
        foreign = [run for run in group if run["proxy"] == "foreign"]
        cells = [_values(run for run in own if run["method"] == method) for method in METHODS]
        first = group[0]
        rows.append(
            [
                network,
                first["metric"],
                budget,
                f"{first['float_value']:.2f}",
                *cells,
                _values(foreign),
                _ahead(own),
            ]
        )
    return _table(rows, left=3)


def _ahead(runs: Sequence[Run]) -> str:
    """Difference to the better of the two uniform rows, seed by seed."""
    fisher = {run["seed"]: run["value"] for run in runs if run["method"] == "fisher"}
    controls: dict[int, float] = {}
    for run in runs:
        if run["method"] in ("uniform", "two widths"):
            controls[run["seed"]] = max(run["value"], controls.get(run["seed"], run["value"]))
    return paired(fisher, controls)


def _steps(runs: Sequence[Run]) -> str:
    rows = [["network", "budget", "policy", "float", *(str(step or "none") for step in STEPS)]]
    own = [run for run in runs if run["proxy"] == "own"]
    for (network, budget, method), group in groups(own, ("network", "variant", "method")).items():
        by_step = groups(group, ("settings.repair",))
        if len(by_step) < 2:
            continue
        cells = [_timed(by_step.get((step,), [])) for step in STEPS]
        rows.append([network, budget, method, f"{group[0]['float_value']:.2f}", *cells])
    return _table(rows, left=3)


def _timed(runs: Sequence[Run]) -> str:
    if not runs:
        return "-"
    seconds = statistics.mean(run["extra"]["quantize_s"] for run in runs)
    return f"{_values(runs)} in {seconds:.0f} s"


def _values(runs: Iterable[Run]) -> str:
    values = [run["value"] for run in runs]
    if not values:
        return "-"
    count = f" (n={len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{count}"


def _table(rows: Sequence[Sequence[str]], left: int) -> str:
    line = [*["---"] * left, *["---:"] * (len(rows[0]) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], line, *rows[1:]))
