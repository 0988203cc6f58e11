"""Tables and the figure of bits that follow the image: the comparison, the deployments of one network, bits and top-1 by quality."""

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.dqmq import LEARNED, LONGER, NETWORK, RANDOM, STATIC
from benchmarks.summaries_common import Run, compared, groups, with_schedule
from bitscape.data.corruptions import CORRUPTIONS
from bitscape.engine.quality_table import Cell, QualityTable
from bitscape.errors import BitscapeError
from bitscape.report.differences import difference
from bitscape.report.heat_map import heat_map
from bitscape.report.tables import Column

GROUP = ("settings.budget", "settings.images", "settings.schedule")
NAMES = {"method": "method", "variant": "variant"}
REFERENCES = {"against static mixed, points [95 %]": STATIC, "against random bits": RANDOM}
COLUMNS = (
    Column(value="top1", heading="top-1, %"),
    Column(value="extra.clean", heading="clean"),
    Column(value="extra.seen", heading="seen corruptions"),
    Column(value="extra.held_out", heading="held-out ones"),
    Column(value="cost.mean_activation_bits", heading="mean activation bits"),
    Column(value="extra.of_budget", heading="BitOps, % of the budget", digits=1),
    Column(value="train_s", heading="training, s", digits=0),
)


def dqmq(runs: Sequence[Run]) -> str:
    """For each budget the methods side by side, then what one learned network gives in every form of use."""
    parts = []
    for (budget, images, epochs), group in groups([with_schedule(_with_share(run), LONGER) for run in runs], GROUP).items():
        recipe = f"{images:,} images of mixed quality, epochs: {epochs}, float on clean images {group[0]['float_top1']} %"
        table = compared(group, NAMES, COLUMNS, REFERENCES)
        parts.append(f"**{NETWORK} on {group[0]['target']}, mean BitOps of {budget}**; {recipe}\n\n{table}")
        parts.append(f"**The learned networks at {budget}, used otherwise**\n\n{_same_network(group)}")
    parts.append(f"**Mean activation bits that images get**, by severity\n\n{_bits(runs)}")
    return "\n\n".join(parts)


def figure(runs: Sequence[Run]) -> str:
    """Top-1 and mean bits in every quality, of the learned networks of the first group, as SVG."""
    learned = groups([with_schedule(run, LONGER) for run in runs if (run["method"], run["variant"]) == LEARNED], GROUP)
    if not learned:
        raise BitscapeError("dqmq.jsonl holds no run of the plain method; python -m benchmarks.dqmq makes one")
    return heat_map(QualityTable(tuple(_cells(next(iter(learned.values()))))))


def _with_share(run: Run) -> Run:
    return {**run, "extra": {**run["extra"], "of_budget": 100 * run["cost"]["bitops"] / run["budget"]["bitops"]}}


def _same_network(group: Sequence[Run]) -> str:
    learned = [run for run in group if (run["method"], run["variant"]) == LEARNED]
    if not learned:
        return "no run yet"
    names = [name for name in learned[0]["extra"]["same_network"] if not name.endswith(", bitops")]
    lines = [
        "| decided by | top-1, % | BitOps, % of the budget | against its own decisions, points [95 %] |",
        "| --- | ---: | ---: | --- |",
    ]
    own = statistics.fmean(run["top1"] for run in learned)
    share = statistics.fmean(run["extra"]["of_budget"] for run in learned)
    lines.append(f"| each image (dqmq) | {own:.2f} | {share:.1f} | - |")
    for name in names:
        found = [run["extra"]["same_network"] for run in learned]
        spent = [each.get(f"{name}, bitops") for each in found]
        shares = [100 * bitops / run["budget"]["bitops"] for bitops, run in zip(spent, learned, strict=True) if bitops]
        cost = f"{statistics.fmean(shares):.1f}" if shares else "-"
        gain = difference([each[name] - run["top1"] for each, run in zip(found, learned, strict=True)])
        lines.append(f"| {name} | {statistics.fmean(each[name] for each in found):.2f} | {cost} | {gain} |")
    return "\n".join(lines)


def _bits(runs: Sequence[Run]) -> str:
    lines = ["| budget | quality | 0 | 1 | 2 | 3 | 4 | 5 |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    learned = [with_schedule(run, LONGER) for run in runs if (run["method"], run["variant"]) == LEARNED]
    for (budget, *_), group in groups(learned, GROUP).items():
        cells = {(cell.corruption, cell.severity): cell.bits for cell in _cells(group)}
        for name in dict.fromkeys(corruption for corruption, _ in cells):
            shown = [cells.get((name, severity)) for severity in range(6)]
            numbers = " | ".join("" if bits is None else f"{bits:.2f}" for bits in shown)
            lines.append(f"| {budget} | {name.replace('_', ' ')} | {numbers} |")
    return "\n".join(lines)


def _cells(runs: Sequence[Run]) -> Iterator[Cell]:
    """Means over runs; corruptions in the order of the benchmark's own list."""
    found = [run["extra"]["cells"] for run in runs]
    for name in ("clean", *(each for each in CORRUPTIONS if each in found[0])):
        for severity, first in found[0][name].items():
            cells = [each[name][severity] for each in found]
            yield Cell(
                corruption=name,
                severity=int(severity),
                top1=statistics.fmean(cell["top1"] for cell in cells),
                loss=float("nan"),
                images=first["images"],
                bits=statistics.fmean(cell["bits"] for cell in cells),
                bitops=None,
            )
