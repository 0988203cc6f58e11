"""The table of `depthwise-cifar10`: searched policies against uniform bits and fisher, by seed."""

from collections.abc import Mapping, Sequence

from benchmarks.summaries_common import Run, groups, paired, rows_of, with_column
from bitscape.report.differences import smallest_seen
from bitscape.report.records import identity
from bitscape.report.tables import Column, render

NAMES = {"method": "method", "variant": "variant"}
UNIFORM, FISHER = ("uniform", "one width"), ("fisher", "not for training")
COLUMNS = (
    Column(value="extra.before_training_top1", heading="repaired, %"),
    Column(value="top1", heading="trained, %"),
    Column(value="cost.weight_bytes", heading="weights, kB", digits=1, scale=1e-3),
    Column(value="cost.bitops", heading="MBitOps", digits=0, scale=1e-6),
    Column(value="search_s", heading="search, s", digits=0),
)


def depthwise_cifar10(runs: Sequence[Run]) -> str:
    """A table for each budget and recipe."""
    parts = []
    for (budget, images, epochs), group in groups(
        runs, ("settings.budget", "settings.images", "epochs")
    ).items():
        first = group[0]
        parts.append(
            f"**Budget: {budget}**; {images:,} images an epoch, epochs: {epochs}, "
            f"float {first['float_top1']:.2f} %, "
            f"{first['test_images']:,} test images"
        )
        parts.append(_compared(group))
    return "\n\n".join(parts)


def _compared(runs: Sequence[Run]) -> str:
    rows = rows_of(runs, tuple(NAMES), COLUMNS)
    keys = [identity(row.keys, tuple(NAMES)) for row in rows]
    by_row = groups(runs, tuple(NAMES))
    repaired = {
        key: {run["seed"]: run["extra"]["before_training_top1"] for run in by_row[key]}
        for key in keys
    }
    trained = {key: {run["seed"]: run["top1"] for run in by_row[key]} for key in keys}
    table = render(rows, NAMES, COLUMNS)
    about_repaired, about_trained, fisher = (
        repaired.get(UNIFORM, {}),
        trained.get(UNIFORM, {}),
        trained.get(FISHER, {}),
    )
    table = with_column(
        table,
        "repaired - uniform [95 %]",
        [_against(repaired[key], about_repaired) for key in keys],
    )
    table = with_column(
        table, "trained - uniform [95 %]", [_against(trained[key], about_trained) for key in keys]
    )
    table = with_column(
        table, "could be seen", [_seen(trained[key], about_trained) for key in keys]
    )
    return with_column(
        table, "trained - fisher [95 %]", [_against(trained[key], fisher) for key in keys]
    )


def _against(values: Mapping[int, float], reference: Mapping[int, float]) -> str:
    return "-" if values == reference else paired(values, reference)


def _seen(values: Mapping[int, float], reference: Mapping[int, float]) -> str:
    """The smallest difference to the reference that so many seeds show in four cases of five."""
    seeds = values.keys() & reference.keys()
    if values == reference or len(seeds) < 2:
        return "-"
    return f"{smallest_seen([values[seed] - reference[seed] for seed in seeds]):.2f}"
