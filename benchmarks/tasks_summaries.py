"""The tables of `tasks`: what each network is worth at each budget, and how its files agree with exact integers."""

import statistics
from collections.abc import Sequence

from benchmarks.summaries_common import Run, groups

LARGER_IS_BETTER = {"top1", "accuracy", "hmean", "ap_against_float"}
RANDOM = "random"


def tasks(runs: Sequence[Run]) -> str:
    """One row for each network and budget; then one for each network's files."""
    return f"{_values(runs)}\n\n{_files(runs)}"


def _values(runs: Sequence[Run]) -> str:
    rows = [["network", "task", "metric", "budget", "float", "searched: fisher", "uniform", "random: best, mean, worst"]]
    measured = [run for run in runs if "value" in run and run.get("variant")]
    for (network, budget), group in groups(measured, ("network", "variant")).items():
        first, by_method = group[0], {run["method"]: run["value"] for run in group}
        numbers = [_number(first["float_value"]), *(_number(by_method.get(name)) for name in ("fisher", "uniform"))]
        drawn = [run["value"] for run in group if run["method"] == RANDOM]
        rows.append([network, first["task"], first["metric"], budget, *numbers, _spread(drawn, first["metric"])])
    return _table(rows, left=4)


def _files(runs: Sequence[Run]) -> str:
    rows = [["network", "packed", "ONNX", "codes that differ", "relative error", "OpenVINO", "codes that differ", "relative error"]]
    for run in (run for run in runs if run["method"] == "files"):
        packed, onnx, openvino = (run["extra"][f"net.{suffix}"] for suffix in ("safetensors", "onnx", "xml"))
        rows.append([run["network"], _bytes(packed), *_checked(onnx), *_checked(openvino)])
    return _table(rows, left=1)


def _checked(file: Run) -> list[str]:
    if "refused" in file:
        return ["refused", "-", "-"]
    worst = max(file["relative_error"].values())
    codes = file["parity"]["codes"]
    return [_bytes(file), f"{file['parity']['differing']:.2g} of {codes / 1e6:.3g} M", f"{worst:.1e}"]


def _bytes(file: Run) -> str:
    return "refused" if "refused" in file else f"{file['bytes'] / 1000:.4g} kB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(values: Sequence[float], metric: str) -> str:
    if not values:
        return "-"
    ordered = sorted(values, reverse=metric in LARGER_IS_BETTER)
    return f"{ordered[0]:.2f}, {statistics.mean(values):.2f}, {ordered[-1]:.2f} (n={len(values)})"


def _table(rows: Sequence[Sequence[str]], left: int) -> str:
    line = [*["---"] * left, *["---:"] * (len(rows[0]) - left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], line, *rows[1:]))
