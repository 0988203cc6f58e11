"""The table of deployed files: size, time and accuracy of each beside float, the runtime's own int8 and W8A8."""

from collections.abc import Sequence

from benchmarks.summaries_common import Run, groups, rows_of
from bitscape.report.tables import Column, render

ORDER = ("float", "own int8", "uniform", "mixed")
_COLUMNS = [
    Column(value="extra.file_bytes", heading="file, kB", digits=1, scale=1e-3),
    Column(value="extra.file_to_containers", heading="file / containers", digits=3),
    Column(value="extra.times.batch1.cpu_ms", heading="ms, batch 1", digits=3),
    Column(value="extra.float_over_own_batch1", heading="x float"),
    Column(value="extra.own_over_w8a8_batch1", heading="time / W8A8"),
    Column(value="extra.times.batch16.cpu_ms", heading="ms, batch 16", digits=2),
    Column(value="extra.float_over_own_batch16", heading="x float, 16"),
    Column(value="extra.float_layers", heading="float layers", digits=0),
    Column(value="top1", heading="top-1, %"),
    Column(value="extra.same_class", heading="class of exact integers, %"),
]


def deploy(runs: Sequence[Run]) -> str:
    """A table for each network, runtimes below one another."""
    keys = {"settings.runtime": "runtime", "method": "file", "variant": "bits"}
    parts = []
    for (network, threads), group in groups([_with_ratio(run) for run in runs], ("network", "settings.threads")).items():
        ordered = sorted(group, key=lambda run: (run["settings"]["runtime"], ORDER.index(run["method"])))
        rows = rows_of(ordered, tuple(keys), _COLUMNS)
        rows.sort(key=lambda row: (row.keys["settings.runtime"], ORDER.index(row.keys["method"])))
        versions = ", ".join(sorted({run["extra"]["runtime"] for run in group}))
        parts += [f"**{network}**, {_weights(group)}; {threads} thread, {versions}", render(rows, keys, _COLUMNS)]
    return "\n\n".join([*parts, _parity(runs)])


def _with_ratio(run: Run) -> Run:
    extra = run["extra"]
    stored = extra.get("container_bytes")
    return {**run, "extra": {**extra, "file_to_containers": extra["file_bytes"] / stored if stored else None}}


def _weights(group: Sequence[Run]) -> str:
    if group[0]["weights"] == "random":
        return "random weights"
    return f"float {group[0]['float_top1']} % in PyTorch on all of {group[0]['target']}, rows on {group[0]['test_images']:,} images"


def _parity(runs: Sequence[Run]) -> str:
    """A sentence for each runtime."""
    sentences = []
    for runtime in dict.fromkeys(run["settings"]["runtime"] for run in runs):
        compared = [run["extra"] for run in runs if run["settings"]["runtime"] == runtime and run["extra"].get("codes")]
        if compared:
            codes, differing = (sum(extra[name] for extra in compared) for name in ("codes", "differing_codes"))
            largest = max(extra.get("largest_difference", 0) for extra in compared)
            off = f" ({differing / codes:.1e}), by up to {largest}" if differing else ""
            sentences.append(f"{runtime}: {len(compared)} files, {codes / 1e6:,.1f} M codes, {differing:,} differ{off}.")
    return f"Codes of all layers against exact integers. {' '.join(sentences)}"
