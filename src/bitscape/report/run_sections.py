"""Sections about measurements: comparisons and curves of runs, corruptions, times."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitscape.report.blocks import Block, Figure, Missing, Section, Table, Text
from bitscape.report.charts import SERIES, curve_panel, interval_chart, time_chart
from bitscape.report.compare import verdict, why_none
from bitscape.report.documents import BenchDocument
from bitscape.report.heat_map import heading, quality_panels
from bitscape.report.inputs import TrainedRun
from bitscape.report.material import Material
from bitscape.report.policies import group_of
from bitscape.report.svg import picture
from bitscape.words import NONE, amount, counted, points

Points = list[tuple[float, float]]
CURVES = (
    ("training loss", "loss", True),
    ("training top-1, %", "top1", False),
    ("validation top-1, %", "", False),
    ("mean bits of images", "bits", False),
)
"""Title, entry of a record, log scale; validation has two names."""


def mixed_or_uniform(material: Material) -> Section | Missing:
    """Section 5."""
    title = "Does mixed beat uniform here?"
    if not material.comparisons:
        return Missing(title=title, reason=why_none(material.groups))
    compared = material.comparisons
    blocks: list[Block] = [Text(verdict(each), True) for each in compared]
    if any(each.difference is not None and each.difference.interval is not None for each in compared):
        blocks.append(Figure(caption="Each method minus the best uniform one, paired by seed", pictures=[interval_chart(compared)]))
    rows = [[group.method, f"{group.mean:.2f}", *_spread(list(group.top1.values())), _seeds(group.top1)] for group in material.groups]
    columns = ["bits", "mean top-1, %", "least", "most", "seeds"]
    blocks.append(Table(caption="Validation top-1 over seeds, runs that ended", columns=columns, rows=rows))
    return Section(anchor="mixed", title=title, blocks=blocks)


def curves(material: Material) -> Section | Missing:
    """Section 8."""
    title = "Training"
    runs = {name: run for name, run in material.inputs.runs.items() if run.records}
    if not runs:
        return Missing(title=title, reason="Needs folders of `bitscape train --out`")
    kinds = list(dict.fromkeys(group_of(run) for run in runs.values()))
    series = {kind: at % SERIES for at, kind in enumerate(kinds)}
    pictures = []
    for heading_, entry, log in CURVES:
        found = {name: (series[group_of(run)], own) for name, run in runs.items() if (own := _points(run, entry))}
        pictures += [curve_panel(heading_, found, log=log)] if found else []
    legend = [(f"s{at} curve", kind) for kind, at in series.items()]
    figure = Figure(
        caption=f"{counted(len(runs), 'run')}; a color for each kind of bits, a line for each run", pictures=pictures, legend=legend
    )
    return Section(anchor="training", title=title, blocks=[figure])


def corruptions(material: Material) -> Section | Missing:
    """Section 9."""
    title = "Images of lesser quality"
    if not material.inputs.quality_tables:
        return Missing(title=title, reason="Needs the .json that `bitscape evaluate --corruptions` writes")
    figures = []
    for name, quality in material.inputs.quality_tables.items():
        width, height, body = quality_panels(quality, y=8)
        drawn = picture(f"Corruptions of {name}", heading(quality), width, height, body)
        figures.append(Figure(caption=f"{name}: {heading(quality)}; {quality.clean.images:,} images in each cell", pictures=[drawn]))
    return Section(anchor="corruptions", title=title, blocks=figures)


def deployed(material: Material) -> Section | Missing:
    """Section 10."""
    title = "Deployed: milliseconds and bytes"
    if not material.inputs.benches and not material.inputs.latencies:
        return Missing(title=title, reason="Needs the .json of `bitscape bench --json`, or a table of `bitscape latency build`")
    blocks: list[Block] = []
    for name, bench in material.inputs.benches.items():
        blocks += _bench(name, bench)
    for name, table in material.inputs.latencies.items():
        share = f"by the latency table ({table.where}) fewer bits take it down to {100 * table.spread():.1f} % of its time at 8/8"
        in_float = "" if table.float_ms is None else f" and {table.float_ms:.4g} ms in float"
        times = f"{name}: the network takes {table.network_ms:.4g} ms at 8/8{in_float}; "
        blocks.append(Text(f"{times}{table.note() or share}."))
    return Section(anchor="deployed", title=title, blocks=blocks)


def _points(run: TrainedRun, entry: str) -> Points:
    names: Sequence[str] = (entry,) if entry else ("ema_validation_top1", "validation_top1")
    name = next((name for name in names if all(name in record for record in run.records)), None)
    return [] if name is None else [(record["epoch"], record[name]) for record in run.records]


def _spread(values: Sequence[float]) -> list[str]:
    return [points(min(values)), points(max(values))]


def _seeds(top1: Mapping[int, float]) -> str:
    return ", ".join(map(str, sorted(top1)))


def _bench(name: str, bench: BenchDocument) -> list[Block]:
    optional: tuple[tuple[str, Callable[[Any], str | None]], ...] = (
        ("top-1, %", lambda row: None if row.top1 is None else points(row.top1)),
        ("agrees, %", lambda row: None if row.agreement is None else points(row.agreement)),
        ("off, %", lambda row: None if row.difference is None else points(row.difference)),
    )
    kept = [(title, value) for title, value in optional if any(value(row) for row in bench.rows)]
    rows = [
        [
            *(row.file, row.runtime, str(row.batch_size), amount(row.file_bytes, "B"), str(row.float_layers)),
            *(f"{row.cpu_ms:.4g}", f"{row.wall_ms:.4g}", f"{row.images_per_s:,.0f}"),
            NONE if row.times_faster is None else f"{row.times_faster:.2f}",
            *(value(row) or NONE for _, value in kept),
        ]
        for row in bench.rows
    ]
    columns = ["file", "runtime", "batch", "size", "float layers", "CPU ms", "wall ms", "images/s", "x first"]
    columns += [title for title, _ in kept]
    shape = "x".join(map(str, bench.input_shape))
    caption = f"{name}: images of {shape}, {bench.machine}, threads: {bench.threads}; median of {counted(bench.rounds, 'round')}"
    if images := next((row.images for row in bench.rows if row.images), None):
        caption += f"; outputs are compared with the first row's on {counted(images, 'image')}"
    by, least = ("CPU", "cpu_ms") if bench.threads == 1 else ("wall-clock", "wall_ms"), min(row.batch_size for row in bench.rows)
    times = [(f"{row.file}, {row.runtime}", float(getattr(row, by[1]))) for row in bench.rows if row.batch_size == least]
    title = f"Milliseconds of a batch of {least}, {by[0]} time"
    return [
        Figure(caption=f"{name}: {title}", pictures=[time_chart(times, title)]),
        Table(caption=caption, columns=columns, rows=rows, left=2),
    ]
