"""One table for each results file: what its runs say, and under which conditions they were made."""

import statistics
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from benchmarks.allocate_summaries import allocate
from benchmarks.compatibility_summaries import compatibility
from benchmarks.deploy_summaries import deploy
from benchmarks.depthwise_summaries import depthwise_cifar10
from benchmarks.dqmq_summaries import dqmq
from benchmarks.first_policy_summaries import first_policy
from benchmarks.hardening_summaries import hardening
from benchmarks.npu_summaries import ethos_u, fpga, tflite
from benchmarks.ptq_summaries import ptq
from benchmarks.saq_summaries import saq
from benchmarks.speed_summaries import speed
from benchmarks.summaries_common import Run, groups, paired, rows_of, with_column
from benchmarks.tasks_summaries import tasks
from benchmarks.transfer_summaries import asga_ladder, seam_margins, transfer_policies, transfer_scores
from benchmarks.workers_summaries import workers
from bitscape.report.records import identity, read_runs, value_of
from bitscape.report.tables import Column, Row, render

NO_RUNS = "no runs yet"


def tables(results: Path) -> dict[str, str]:
    """Name of the table -> its text; "no runs yet" where the folder `results` has no file of that name."""
    return {name: _table(read_runs(results / f"{name}.jsonl"), make) for name, make in MAKERS.items()}


def ptq_imagenet(runs: Sequence[Run]) -> str:
    """A table for each network and activation width: searched policies between uniform and random ones, before and after repair."""
    runs = [run if run["method"] == "float" else {**run, "proxy": _images(run)} for run in runs]
    columns = [
        Column(value="extra.plain_top1", heading="top-1 before repair, %"),
        Column(value="top1", heading="after repair, %"),
        Column(value="cost.mean_weight_bits", heading="mean weight bits"),
        Column(value="search_s", heading="search, s", digits=1),
    ]
    parts = []
    for (network, width), group in groups(runs, ("network", "settings.activation_bits")).items():
        rows = rows_of(group, ("method", "proxy"), columns)
        randoms = [run["top1"] for run in group if run["method"] == "random"]
        lower = [_lower_randoms(row, randoms) for row in rows]
        table = render(rows, {"method": "method", "proxy": "images"}, columns)
        heading = f"**{network}, {width}-bit activations**; {_standard_error(group)}"
        parts += [heading, with_column(table, "random policies with less after repair", lower)]
    return "\n\n".join(parts)


def _images(run: Run) -> str:
    proxy = run.get("proxy") or "target's own"
    return f"{proxy} for the policy, then target's own" if run.get("variant") else proxy


def qat_cifar10(runs: Sequence[Run]) -> str:
    """A table for each budget and recipe, each row against the best uniform one."""
    columns = [
        Column(value="top1", heading="top-1, %"),
        Column(value="extra.before_training_top1", heading="before training, %"),
        Column(value="cost.bitops", heading="MBitOps", digits=1, scale=1e-6),
        Column(value="search_s", heading="search, s", digits=1),
    ]
    parts = []
    for (budget, images, epochs), group in groups(runs, ("settings.budget", "settings.images", "epochs")).items():
        rows = rows_of(group, ("method", "variant"), columns)
        table = render(rows, {"method": "method", "variant": "variant"}, columns)
        recipe = f"{images:,} images an epoch, epochs: {epochs}, float {group[0]['float_top1']} %"
        heading = f"**Budget: BitOps of {budget}, {group[0]['budget']['bitops'] / 1e6:.1f} M**; {recipe}"
        parts += [heading, with_column(table, "against the best uniform row, points [95 %]", _against_uniform(rows, group))]
    return "\n\n".join(parts)


def packed_sizes(runs: Sequence[Run]) -> str:
    """Bytes of packed files."""
    columns = [
        Column(value="extra.file_bytes", heading="file, kB", digits=1, scale=1e-3),
        Column(value="cost.weight_bytes", heading="bits and scales, kB", digits=1, scale=1e-3),
        Column(value="extra.other_bytes", heading="other tensors, kB", digits=1, scale=1e-3),
        Column(value="extra.header_bytes", heading="header, kB", digits=1, scale=1e-3),
        Column(value="extra.file_to_policy", heading="file / bits and scales", digits=3),
        Column(value="extra.float32_to_file", heading="float32 / file"),
        Column(value="extra.load_s", heading="load, s", digits=3),
    ]
    runs = [{**run, "weights": "random" if run["weights"].startswith("random") else "trained"} for run in runs]
    keys = {"network": "network", "weights": "weights", "method": "method", "variant": "variant"}
    return render(rows_of(runs, tuple(keys), columns), keys, columns)


def peer(runs: Sequence[Run]) -> str:
    """Another toolkit beside ours, each of its rows against fisher with the same widths."""
    columns = [
        Column(value="top1", heading="top-1, %"),
        Column(value="cost.weight_bytes", heading="bits and scales, kB", digits=1, scale=1e-3),
        Column(value="cost.mean_weight_bits", heading="mean weight bits"),
        Column(value="search_s", heading="process time, s", digits=1),
        Column(value="extra.wall_s", heading="wall time, s", digits=1),
    ]
    rows = rows_of(runs, ("method", "variant"), columns)
    table = render(rows, {"method": "method", "variant": "widths"}, columns)
    top1 = _top1_by_seed(rows, runs)
    cells = [paired(top1[key], top1.get(("fisher", key[1]), {})) if key[0] not in ("float", "uniform", "fisher") else "-" for key in top1]
    versions: dict[str, str] = next((found for run in runs if (found := value_of(run, "extra.peer_versions"))), {})
    heading = "Peer: " + (", ".join(f"{name} {version}" for name, version in versions.items()) or "no runs yet") + "."
    return heading + "\n\n" + with_column(table, "against fisher with these widths, points [95 %]", cells)


MAKERS: dict[str, Callable[[Sequence[Run]], str]] = {
    "ptq": ptq,
    "ptq-imagenet": ptq_imagenet,
    "qat-cifar10": qat_cifar10,
    "depthwise-cifar10": depthwise_cifar10,
    "transfer-scores": transfer_scores,
    "transfer-policies": transfer_policies,
    "asga-ladder": asga_ladder,
    "seam-margins": seam_margins,
    "saq": saq,
    "dqmq": dqmq,
    "deploy": deploy,
    "compatibility": compatibility,
    "hardening": hardening,
    "packed-sizes": packed_sizes,
    "speed": speed,
    "allocate": allocate,
    "workers": workers,
    "first-policy": first_policy,
    "peer": peer,
    "tasks": tasks,
    "tflite": tflite,
    "ethos-u": ethos_u,
    "fpga": fpga,
}
"""Name of the table and of its results file -> what makes it."""


def conditions(runs: Sequence[Run]) -> str:
    """Machine, software, commits, dates and commands of the runs, on one line."""
    threads = sorted({run["threads"] for run in runs if run.get("threads")})
    software = {name: sorted({run["versions"].get(name, "?") for run in runs}) for name in ("python", "torch", "numpy", "bitscape")}
    commands = list(dict.fromkeys(f"`{run['command']}`" for run in runs))
    more = [f"{len(commands) - 2} more (in the results file)"] if len(commands) > 2 else []
    dates = sorted({run["date"][:10] for run in runs})
    commits = dict.fromkeys(run["commit"][:7] + ("-dirty" if run["commit"].endswith("-dirty") else "") for run in runs)
    parts = [
        f"{len(runs)} runs on {' and on '.join(dict.fromkeys(run['device'] for run in runs))}",
        *([f"threads: {', '.join(map(str, threads))}"] if threads else []),
        ", ".join(f"{name} {' and '.join(found)}" for name, found in software.items()),
        f"commit {', '.join(commits)}",
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        " and ".join([*commands[:2], *more]),
    ]
    return "Conditions: " + "; ".join(parts) + "."


def _table(runs: Sequence[Run], make: Callable[[Sequence[Run]], str]) -> str:
    return f"{make(runs)}\n\n{conditions(runs)}" if runs else NO_RUNS


def _lower_randoms(row: Row, randoms: Sequence[float]) -> str:
    top1 = row.summaries["top1"]
    if not randoms or row.keys["method"] in ("float", "random") or top1 is None:
        return "-"
    return f"{sum(value < top1.mean for value in randoms)} of {len(randoms)}"


def _standard_error(runs: Sequence[Run]) -> str:
    images = runs[0]["test_images"]
    share = max(run["top1"] for run in runs) / 100
    return f"{images} test images, so one standard error at {100 * share:.1f} % is {100 * sqrt(share * (1 - share) / images):.1f} points"


def _against_uniform(rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    top1 = _top1_by_seed(rows, runs)
    uniform = [key for key in top1 if key[0] == "uniform"]
    if not uniform:
        return ["-" for _ in rows]
    best = max(uniform, key=lambda key: (len(top1[key]), statistics.fmean(top1[key].values())))
    return ["the best uniform row" if key == best else paired(top1[key], top1[best]) for key in top1]


def _top1_by_seed(rows: Sequence[Row], runs: Sequence[Run]) -> dict[tuple[Any, ...], dict[int, float]]:
    """(method, variant) of each row, in order -> seed -> top-1."""
    by_row: dict[tuple[Any, ...], dict[int, float]] = {identity(row.keys, ("method", "variant")): {} for row in rows}
    for run in runs:
        by_row[identity(run, ("method", "variant"))][run["seed"]] = run["top1"]
    return by_row
