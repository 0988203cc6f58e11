"""The tables of speed: ratios beside goals, kernels, whole jobs, how they grow, allocations."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.summaries_common import Run, groups

STEPS = {
    "train": "LSQ",
    "brevitas": "Brevitas",
    "pt2e": "PT2E",
    "mixture": "mixture search",
    "asga": "asga, over a mixture search",
}
"""Method of a run -> its step in words; float training is 1 where nothing else is named."""
GOALS = {
    ("train", "resnet20", "float32"): 0.92,
    ("train", "resnet20", "bfloat16"): 0.86,
    ("train", "mobilenetv2_tfslim", "float32"): 0.93,
    ("train", "mobilenetv2_tfslim", "bfloat16"): 0.88,
    ("train", "vit_tiny", "float32"): 0.85,
    ("train", "vit_tiny", "bfloat16"): 0.80,
    ("mixture", "resnet20", "float32"): 0.80,
    ("mixture", "mobilenetv2_tfslim", "float32"): 0.70,
}
"""Method, network and type -> the least ratio aimed at."""


def speed(runs: Sequence[Run]) -> str:
    """Every table that has runs."""
    return "\n\n".join(_parts(runs))


def _parts(runs: Sequence[Run]) -> Iterator[str]:
    of = {method: group for (method,), group in groups(runs, ("method",)).items()}
    if ratios := [run for method in STEPS for run in of.get(method, [])]:
        yield _ratios(ratios)
    for method, table in TABLES.items():
        if method in of:
            yield table(of[method])


def _ratios(runs: Sequence[Run]) -> str:
    head = ["network", "batch", "step", "mode", "type", "freed memory", "ratio", "goal"]
    numbers = ["images/s of 1", "images/s", "start-up, s", "memory ratio", "load"]
    by_network = [run for group in groups(runs, ("network",)).values() for run in group]
    return _table("Ratios of training speed", head, numbers, map(_ratio, by_network))


def _ratio(run: Run) -> list[str]:
    extra, settings = run["extra"], run["settings"]
    first, second = (value for name, value in extra.items() if name.endswith("_images_per_s"))
    low, _, high = extra["ratio_quartiles"]
    goal = GOALS.get((run["method"], run["network"], run["dtype"]))
    *_, start_up = extra["start_up_wall_s"].values() if "start_up_wall_s" in extra else [None]
    return [
        *(run["network"], str(settings["batch_size"]), STEPS[run["method"]]),
        *(run["variant"], run["dtype"]),
        "given back" if settings["allocator"] == "default" else "kept",
        f"{extra['ratio']:.3f} [{low:.3f}, {high:.3f}]",
        _number(goal, 2),
        *(_number(first, 1), _number(second, 1), _number(start_up, 1)),
        *(_number(extra.get("memory_ratio"), 2), _load(run)),
    ]


def _kernels(runs: Sequence[Run]) -> str:
    copies = {run["dtype"]: _milliseconds(run) for run in runs if run["variant"] == "copy"}
    cells = [
        [
            *(run["variant"], run["dtype"]),
            *(_number(run["extra"][f"{name}_ms"], 1) for name in ("forward", "backward")),
            _number(_milliseconds(run) / copies[run["dtype"]], 2) if copies else "-",
            *(_number(run["extra"]["start_up_wall_s"], 2), _load(run)),
        ]
        for run in runs
    ]
    numbers = ["forward, ms", "backward, ms", "both over copies", "start-up, s", "load"]
    heading = f"One tensor ({runs[0]['settings']['shape'].replace(' ', ', ')}) quantized"
    return _table(heading, ["by", "type"], numbers, cells)


def _milliseconds(run: Run) -> float:
    return float(run["extra"]["forward_ms"] + run["extra"]["backward_ms"])


def _jobs(runs: Sequence[Run]) -> str:
    cells = [
        [
            *(run["network"], run["variant"]),
            *(str(run["settings"]["images"]), str(run["threads"])),
            *(_number(run["search_s"], 1), _number(run["extra"]["wall_s"], 1)),
            *(_number(run["peak_bytes"] * 1e-6, 0), _load(run)),
        ]
        for run in runs
    ]
    numbers = ["images", "threads", "process time, s", "wall time, s", "peak, MB", "load"]
    return _table("Whole jobs", ["network", "job"], numbers, cells)


def _growth(runs: Sequence[Run]) -> str:
    cells = []
    for (along,), group in groups(runs, ("variant",)).items():
        values = [run["settings"][along] for run in group]
        columns = {"s": [run["search_s"] for run in group]}
        columns["MB"] = [run["peak_bytes"] * 1e-6 for run in group]
        cells.append([along, ", ".join(map(str, values))])
        for each, digits in zip(columns.values(), (1, 0), strict=True):
            shown = ", ".join(_number(one, digits) for one in each)
            cells[-1] += [shown, _number(exponent(values, each), 2)]
    head = ["what grows", "values"]
    numbers = ["process time, s", "exponent", "peak, MB", "exponent"]
    return _table("Fisher scoring of CIFAR ResNets as one quantity grows", head, numbers, cells)


def exponent(values: Sequence[float], results: Sequence[float]) -> float | None:
    """The power of the values that the results follow best; None of a single value."""
    if len(set(values)) < 2:
        return None
    logs = ([math.log(one) for one in each] for each in (values, results))
    return statistics.linear_regression(*logs).slope


def _allocations(runs: Sequence[Run]) -> str:
    names = ("layers", "pairs", "caps", "instances")
    cells = [
        [
            *(str(run["settings"][name]) for name in names),
            *(_number(run["search_s"], 2), _number(run["extra"]["max_process_s"], 2), _load(run)),
        ]
        for run in runs
    ]
    numbers = [*names, "median process time, s", "longest, s", "load"]
    return _table("Allocations from given scores", [], numbers, cells)


def _table(heading: str, words: Sequence[str], numbers: Sequence[str], cells: Any) -> str:
    rule = [*("---" for _ in words), *("---:" for _ in numbers)]
    lines = [[*words, *numbers], rule, *cells]
    return f"**{heading}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _load(run: Run) -> str:
    return _number(max(run["extra"]["load_average"]), 1)


TABLES = {"kernel": _kernels, "job": _jobs, "growth": _growth, "allocate": _allocations}
"""Method of runs -> what makes their table."""
