"""Tables of flat training: the comparison, the sweep of the radius, accuracy on corrupted images."""

from collections.abc import Sequence

from benchmarks.figures import contours
from benchmarks.saq import LONGER, PLAIN, SWEEP_SEED
from benchmarks.summaries_common import Run, compared, groups, rows_of, with_schedule
from bitscape.report.tables import Column, aggregate, render
from bitscape.sharpness import LossSlice

ROW = ("method", "variant")
GROUP = ("network", "settings.budget", "settings.images", "settings.schedule")
NAMES = {"method": "method", "variant": "variant"}
REFERENCES = {"against plain, points [95 %]": PLAIN, "against plain with twice the epochs": LONGER}


def landscape(runs: Sequence[Run]) -> str:
    """The loss around each network, as SVG."""
    return contours({" ".join(filter(None, (run["method"], run["variant"]))): LossSlice(**run["extra"]["slice"]) for run in runs})


def saq(runs: Sequence[Run]) -> str:
    """A table for each network and policy: every step beside plain training, at equal epochs and at equal time."""
    columns = [
        Column(value="top1", heading="top-1, %"),
        Column(value="extra.gap", heading="gap at radius 0.05", digits=3),
        Column(value="extra.adaptive_gap", heading="gap by size, 0.2", digits=3),
        Column(value="extra.eigenvalue", heading="top eigenvalue", digits=0),
        Column(value="extra.corrupted.mean", heading="top-1 on corrupted images, %"),
        Column(value="extra.step_process_s", heading="process s a step", digits=3),
    ]
    parts = []
    trained = [with_schedule(run, LONGER) for run in runs if run["seed"] != SWEEP_SEED]
    for (network, budget, images, epochs), group in groups(trained, GROUP).items():
        table = compared(group, NAMES, columns, REFERENCES)
        rhos = sorted({run["settings"]["rho"] for run in group if run["settings"]["rho"]})
        recipe = f"{images:,} images an epoch, epochs: {epochs}, radius: {', '.join(map(str, rhos)) or '-'}"
        parts.append(f"**{network} on {group[0]['target']}, {budget}**; {recipe}, float {group[0]['float_top1']} %\n\n{table}")
    return "\n\n".join(part for part in (*parts, on_corrupted(runs), radius_sweep(runs)) if part)


def radius_sweep(runs: Sequence[Run]) -> str:
    """Top-1 for each radius of the sweep."""
    swept = [run for run in runs if run["seed"] == SWEEP_SEED]
    if not swept:
        return ""
    columns = [
        Column(value="top1", heading="top-1, %"),
        Column(value="extra.training_loss", heading="training loss", digits=3),
        Column(value="extra.gap", heading="gap at radius 0.05", digits=3),
    ]
    parts = []
    for (quantizer, images, epochs), group in groups(swept, ("settings.quantizer", "settings.images", "epochs")).items():
        rows = aggregate(group, (*ROW, "settings.rho"), [column.value for column in columns])
        about = (
            f"{group[0]['network']} on {group[0]['target']}, {group[0]['settings']['budget']}, {images:,} images an epoch, epochs: {epochs}"
        )
        table = render(rows, {**NAMES, "settings.rho": "radius"}, columns)
        parts.append(f"**Sweep of the radius, {quantizer or 'lsq'}**, one seed that the tables above do not use: {about}\n\n{table}")
    return "\n\n".join(parts)


def on_corrupted(runs: Sequence[Run]) -> str:
    """Top-1 on each corruption."""
    measured = [run for run in runs if run["extra"].get("corrupted")]
    if not measured:
        return ""
    names = measured[0]["extra"]["corrupted"]
    columns = [Column(value=f"extra.corrupted.{name}", heading=name.replace("_", " "), digits=1) for name in names]
    parts = []
    for (network, budget, _, epochs), group in groups([with_schedule(run, LONGER) for run in measured], GROUP).items():
        parts.append(
            f"**{network} on {group[0]['target']}, {budget}**, epochs: {epochs}; top-1 in percent, mean over severities 1, 3 and 5"
        )
        parts.append(render(rows_of(group, ROW, columns), NAMES, columns))
    return "\n\n".join(parts)
