"""Figures as SVG: loss landscapes, and accuracy at equal bytes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

import bitscape as bs
from benchmarks.summaries_common import Run, groups
from benchmarks.transfer_summaries import text
from bitscape.sharpness import LossSlice

SIDE, LEFT, TOP, ACROSS, DOWN = 240, 66, 84, 290, 326
"""Pixels: side of a panel, place of the first one, steps from panel to panel."""
BANDS = 12
"""Colors of the scale."""
RAMP = ((255, 250, 214), (74, 178, 190), (10, 31, 92))
"""From low loss to high; lightness falls all the way, so that no hue needs to be told apart."""
LABEL = "Loss around networks, along two random filter-normalized directions; one logarithmic scale"

EQUAL_BYTES = "Top-1 without training, all within the bytes of uniform 4-bit weights; activations, first and last layer at 8 bits"
ROWS = {
    ("fisher", ""): "mixed: fisher",
    ("fisher", "policy only"): "mixed: fisher, searched on CIFAR-10 images",
    ("kl", ""): "mixed: kl",
    ("local", ""): "mixed: local, a plain error ranking",
    ("uniform", ""): "uniform 4 bits",
    ("random", ""): "random bits",
}
"""(method, variant) -> what its row is called, from top to bottom."""
LINE, ZERO, HUNDRED, TITLE = 25, 292, 742, 74
"""Pixels: step from row to row, x of 0 % and of 100 %, y of the first panel's title."""
MIXED, CONTROL = "#0b5394", "#b45309"
"""Searched policies, and what they must beat; the words beside the rows say it too."""

Point = tuple[float, float]
Corner = tuple[Point, float]
"""Where on the page, and the logarithm of the loss there."""


def contours(slices: Mapping[str, LossSlice]) -> str:
    """An SVG of filled contours: a panel for each network, under its name, on one scale of colors.

    Names of up to about 35 characters fit. A loss that is not finite is drawn like the highest finite one, a loss of 0
    like the lowest above 0.

    Raises:
        BitscapeError: no slice, or no loss above 0.
    """
    edges = _edges(slices)
    columns = min(len(slices), 2 if len(slices) == 4 else 3)
    rows = math.ceil(len(slices) / columns)
    panels = [
        _panel(LEFT + at % columns * ACROSS, TOP + at // columns * DOWN, name, each, edges)
        for at, (name, each) in enumerate(slices.items())
    ]
    bar_x = LEFT + columns * ACROSS - 10
    width, height = max(bar_x + 90, 600), TOP + rows * DOWN - 20
    body = "\n".join([*panels, _color_bar(bar_x, TOP, edges)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{LABEL}" font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f"{text(16, 20, LABEL, 'start', 12)}\n{body}\n</svg>\n"
    )


def _edges(slices: Mapping[str, LossSlice]) -> list[float]:
    """Natural logarithms of the losses at which the color changes, the ends of the scale among them."""
    drawn = [math.log(loss) for each in slices.values() for row in each.losses for loss in row if 0 < loss < math.inf]
    if not drawn:
        raise bs.BitscapeError(f"slices = {list(slices)}: give at least one slice with losses above 0, from loss_slice")
    low, high = min(drawn), max(drawn)
    return [low + (high - low) * at / BANDS for at in range(BANDS + 1)]


def _panel(x: float, y: float, name: str, each: LossSlice, edges: Sequence[float]) -> str:
    span = each.offsets[-1]
    middle, bottom = x + SIDE / 2, y + SIDE
    parts = ['<g class="panel">', text(middle, y - 26, escape(name), "middle", 13, bold=True)]
    parts += [text(middle, y - 9, f"at the center {each.center:.3g}", "middle", 11)]
    parts += [f'<rect x="{x:g}" y="{y:g}" width="{SIDE}" height="{SIDE}" fill="{_color(0)}"/>', *_bands(x, y, each, edges)]
    parts += [f'<circle cx="{middle:g}" cy="{y + SIDE / 2:g}" r="3" fill="#ffffff" stroke="#1a1a1a"/>']
    for share in (0.0, 0.5, 1.0):
        value = f"{span * (2 * share - 1):g}"
        parts += [text(x + share * SIDE, bottom + 15, value, "middle", 10), text(x - 6, bottom - share * SIDE + 4, value, "end", 10)]
    parts += [text(middle, bottom + 31, "a, along the first direction", "middle", 11)]
    upright = text(0, 0, "b, along the second direction", "middle", 11)
    parts += [f'<g transform="translate({x - 32:g} {y + SIDE / 2:g}) rotate(-90)">{upright}</g>', "</g>"]
    return "\n".join(parts)


def _bands(x: float, y: float, each: LossSlice, edges: Sequence[float]) -> Iterator[str]:
    """All places above an edge in its color, one edge over the other, from low to high; a path each, so that no seams show."""
    cells = list(_cells(x, y, each, edges[0], edges[-1]))
    for at, (edge, following) in enumerate(pairwise(edges)):
        # What lies above the next edge altogether is painted over.
        shown = [cell for cell in cells if at == BANDS - 1 or min(value for _, value in cell) < following]
        drawn = "".join(_outline(part) for cell in shown if (part := _above(cell, edge)))
        if drawn and at:
            yield f'<path d="{drawn}" fill="{_color(at)}"/>'


def _cells(x: float, y: float, each: LossSlice, low: float, high: float) -> Iterator[list[Corner]]:
    """The squares between four neighbouring points of the slice."""
    steps = len(each.offsets) - 1

    def corner(i: int, j: int) -> Corner:
        loss = each.losses[i][j]
        height = high if not math.isfinite(loss) else max(math.log(loss), low) if loss > 0 else low
        return (x + SIDE * i / steps, y + SIDE * (1 - j / steps)), height

    for i in range(steps):
        for j in range(steps):
            yield [corner(i, j), corner(i + 1, j), corner(i + 1, j + 1), corner(i, j + 1)]


def _above(cell: Sequence[Corner], edge: float) -> list[Point]:
    """The part of a cell above the edge: losses go linearly along its sides (Sutherland, Hodgman: CACM 17(1), 1974)."""
    kept = []
    for (p, v), (q, w) in pairwise([*cell, cell[0]]):
        if v >= edge:
            kept.append(p)
        if (v >= edge) != (w >= edge):
            share = (edge - v) / (w - v)
            kept.append((p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])))
    return kept


def _outline(points: Sequence[Point]) -> str:
    return f"M{' '.join(f'{round(x, 1):g},{round(y, 1):g}' for x, y in points)}Z"


def _color_bar(x: float, y: float, edges: Sequence[float]) -> str:
    tall = SIDE / BANDS
    parts = ['<g class="scale">', text(x, y - 9, "loss", "start", 11)]
    parts += [
        f'<rect x="{x:g}" y="{y + SIDE - (at + 1) * tall:g}" width="16" height="{tall:g}" fill="{_color(at)}"/>' for at in range(BANDS)
    ]
    parts += [text(x + 22, y + SIDE - at * tall + 4, f"{math.exp(edge):.3g}", "start", 10) for at, edge in enumerate(edges)]
    return "\n".join([*parts, "</g>"])


def _color(band: int) -> str:
    share = band / (BANDS - 1) * (len(RAMP) - 1)
    at = min(int(share), len(RAMP) - 2)
    return "#" + "".join(f"{round(one + (two - one) * (share - at)):02x}" for one, two in zip(RAMP[at], RAMP[at + 1], strict=True))


def equal_bytes(runs: Sequence[Run]) -> str:
    """An SVG of top-1 before (ring) and after repair (disc) at one size: a panel for each network, a row for each way to choose the bits.

    runs: of the benchmark ptq-imagenet; those at 8-bit activations are drawn, with scores and repair on the target's images, but for the
    row that says otherwise. Bars are one standard error of the test images to both sides; float is a dashed line.

    Raises:
        BitscapeError: no such run.
    """
    drawn, y = [], TITLE
    shown = [run for run in runs if run["settings"] == {"activation_bits": 8}]
    for (network,), group in groups(shown, ("network",)).items():
        drawn.append(_panel_of_rows(y, network, group))
        y += 66 + LINE * len(_rows(group))
    if not drawn:
        raise bs.BitscapeError("ptq-imagenet.jsonl holds no run at 8-bit activations; python -m benchmarks.ptq_imagenet makes them")
    width, height = HUNDRED + 46, y - 26
    legend = [_ring(ZERO, 40), text(ZERO + 10, 44, "before repair", "start", 11)]
    legend += [_disc(ZERO + 108, 40, MIXED), _disc(ZERO + 124, 40, CONTROL)]
    legend += [text(ZERO + 134, 44, "after repair: mixed, controls", "start", 11)]
    legend += [f'<path d="M{ZERO + 310},40h24" stroke="#1a1a1a" stroke-dasharray="4 3"/>']
    legend += [text(ZERO + 340, 44, "float network", "start", 11)]
    body = "\n".join([*legend, *drawn])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{EQUAL_BYTES}" font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f"{text(16, 20, EQUAL_BYTES, 'start', 12)}\n{body}\n</svg>\n"
    )


def _rows(group: Sequence[Run]) -> dict[str, list[Run]]:
    """Name of the row -> its runs, in the order of ROWS."""
    found: dict[str, list[Run]] = {name: [] for name in ROWS.values()}
    for run in group:
        name = ROWS.get((run["method"], run.get("variant") or ""))
        foreign = (run.get("proxy") or "").partition(":")[0]
        if name and foreign == ("cifar10" if run.get("variant") else ""):
            found[name].append(run)
    return {name: runs for name, runs in found.items() if runs}


def _panel_of_rows(y: float, network: str, group: Sequence[Run]) -> str:
    rows = _rows(group)
    bottom = y + 12 + LINE * len(rows)
    parts = ['<g class="panel">', text(16, y, escape(f"{network}, {group[0]['test_images']} ImageNet images"), "start", 13, bold=True)]
    for percent in range(0, 101, 20):
        parts += [f'<path d="M{_x(percent):g},{y + 8:g}V{bottom:g}" stroke="#d9d9d9"/>']
        parts += [text(_x(percent), bottom + 15, f"{percent} %", "middle", 10)]
    for run in group:
        if run["method"] == "float":
            x = _x(run["top1"])
            parts += [f'<path d="M{x:g},{y + 8:g}V{bottom:g}" stroke="#1a1a1a" stroke-dasharray="4 3"/>']
            parts += [text(x, y + 4, f"{run['top1']:.1f}", "middle", 10)]
    for at, (name, runs) in enumerate(rows.items()):
        parts.append(_row_of_runs(y + 24 + at * LINE, name, runs))
    return "\n".join([*parts, "</g>"])


def _row_of_runs(y: float, name: str, runs: Sequence[Run]) -> str:
    color = MIXED if name.startswith("mixed") else CONTROL
    count = f", {len(runs)} draws" if len(runs) > 1 else ""
    parts = ['<g class="row">', text(ZERO - 12, y + 4, name + count, "end", 11)]
    for run in runs:
        before, after = run["extra"].get("plain_top1"), run["top1"]
        if before is not None:
            parts += [f'<path d="M{_x(before):g},{y:g}H{_x(after):g}" stroke="#9a9a9a"/>', _ring(_x(before), y)]
        error = 100 * math.sqrt(after / 100 * (1 - after / 100) / run["test_images"])
        parts += [f'<path d="M{_x(after - error):g},{y:g}H{_x(after + error):g}" stroke="{color}" stroke-width="2"/>']
        parts += [_disc(_x(after), y, color)]
    if len(runs) == 1:
        parts.append(text(HUNDRED + 10, y + 4, f"{runs[0]['top1']:.1f}", "start", 11))
    return "\n".join([*parts, "</g>"])


def _x(percent: float) -> float:
    return round(ZERO + (HUNDRED - ZERO) * percent / 100, 1)


def _ring(x: float, y: float) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="#ffffff" stroke="#6a6a6a" stroke-width="1.5"/>'


def _disc(x: float, y: float, color: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="4.5" fill="{color}"/>'
