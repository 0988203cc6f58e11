"""Tables and the figure of what transfers: scores, policies, the ladder of ASGA, class margins."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.summaries_common import Run, groups, paired, rows_of, with_column
from benchmarks.transfer_scores import agreements, rank_correlations
from bitscape.report.records import identity, value_of
from bitscape.report.tables import Column, Row, render

OWN = "target's own"
Cell = Callable[[Mapping[str, Any]], str]


def transfer_policies(runs: Sequence[Run]) -> str:
    """A table for each network and budget: each search on each proxy, against the best uniform row and against the whole target."""
    columns = [
        Column(value="top1", heading="top-1, %"),
        Column(value="cost.bitops", heading="MBitOps", digits=1, scale=1e-6),
        Column(value="search_s", heading="search, s", digits=0),
        Column(value="extra.before_training_top1", heading="before training, %"),
    ]
    parts = []
    for (network, budget, images, epochs), group in groups(runs, ("network", "settings.budget", "settings.images", "epochs")).items():
        rows = rows_of(group, ("method", "variant", "proxy"), columns)
        table = render(rows, {"method": "method", "variant": "variant", "proxy": "proxy:images"}, columns)
        top1 = _by_seed(rows, group)
        table = with_column(table, "against the best uniform row, points [95 %]", _against_uniform(top1))
        table = with_column(table, "against the whole target: points; seconds", _against_whole(rows, top1, group[0]["target"]))
        used, recipe = group[0]["budget"]["bitops"] / 1e6, f"{images:,} images an epoch, epochs: {epochs}"
        parts.append(f"**{network} on {group[0]['target']}, BitOps of {budget}, {used:.1f} M**; {recipe}, float {group[0]['float_top1']} %")
        parts.append(table)
    return "\n\n".join(parts)


def asga_ladder(runs: Sequence[Run]) -> str:
    """What each rung adds; the last column counts epochs until the base's final loss of the same seed."""
    reached = [{**run, "extra": {**run["extra"], **_pace(run, runs)}} for run in runs]
    columns = [
        Column(value="extra.gap", heading="gap at radius 0.05", digits=4),
        Column(value="extra.curvature", heading="2 gap / radius²", digits=2),
        Column(value="extra.final_loss", heading="training loss at the end", digits=3),
        Column(value="extra.epochs_to_base", heading="epochs to the base's loss", digits=1),
        Column(value="search_s", heading="search, s", digits=0),
        Column(value="top1", heading="top-1 after training, %"),
    ]
    rows = rows_of(reached, ("method", "variant"), columns)
    table = render(rows, {"variant": "rung"}, columns)
    top1 = {identity(row.keys, ("variant",)): _seeds(runs, row, ("variant",)) for row in rows}
    base = top1.get(("base",), {})
    return with_column(table, "against the base, points [95 %]", ["-" if key == ("base",) else paired(top1[key], base) for key in top1])


def seam_margins(runs: Sequence[Run]) -> str:
    """Mean margins before and after training."""
    names = [name for name in dict.fromkeys(name for run in runs for name in run["extra"]["margin"])]
    columns = [Column(value=f"extra.margin.{name}", heading=f"margin on {name}", digits=3) for name in names]
    parts = []
    for (epochs,), group in groups(runs, ("epochs",)).items():
        table = render(rows_of(group, ("method", "variant"), columns), {"method": "method", "variant": "variant"}, columns)
        parts += [f"**{'Calibrated, not trained' if not epochs else f'Trained, epochs: {epochs}'}**", table]
    return "\n\n".join(parts)


def transfer_scores(runs: Sequence[Run]) -> str:
    """For each network, before and after training: how each score on each proxy ranks 100 policies, and its own policy."""
    ranked, own = rank_correlations(runs), _own_policies(runs)
    parts = []
    for (network, epochs), group in _split(ranked, ("network", "epochs")).items():
        when = "after one short epoch of training" if epochs else "without training"
        parts.append(f"**{network}, {group[0]['policies']} random policies of one cost, {when}**")
        parts.append("Spearman between predicted and measured loss [95 %]:\n\n" + _pivot(group, _with_bounds))
        parts.append("Kendall:\n\n" + _pivot(group, lambda row: _number(row["kendall_loss"])))
        parts.append("Points of top-1 lost by measuring only the ten policies that the score ranks first:\n\n" + _pivot(group, _regret))
    for (network,), group in _split(own, ("network",)).items():
        parts.append(f"**{network}, the policy that each score finds itself**")
        parts.append("Top-1 without training; share of layers with the pair found on the target's images:\n\n" + _pivot(group, _own_policy))
    return "\n\n".join(parts)


def heat_map(runs: Sequence[Run]) -> str:
    """An SVG of the Spearman correlations: a panel for each network and stage, scores down, proxies across."""
    panels = _split(rank_correlations(runs, draws=1), ("network", "epochs"))
    width, height, left, top, gap = 74, 24, 150, 84, 46
    drawn, y = [], top
    widest = 0
    for (network, epochs), group in panels.items():
        scores, proxies = _axes(group)
        widest = max(widest, len(proxies))
        title = f"{network}, {'trained for one short epoch' if epochs else 'not trained'}, {group[0]['policies']} policies"
        drawn.append(text(left, y - 34, title, "start", 13, bold=True))
        drawn += [text(left + (at + 0.5) * width, y - 8, name, "middle", 10) for at, name in enumerate(proxies)]
        cells = {(_score(row), _proxy(row)): row["spearman_loss"] for row in group}
        for line, score in enumerate(scores):
            drawn.append(text(left - 8, y + line * height + 16, score, "end", 11))
            for at, proxy in enumerate(proxies):
                drawn += _cell(left + at * width, y + line * height, width, height, cells.get((score, proxy)))
        y += len(scores) * height + gap + 24
    size = left + widest * width + 16, y - 30
    body = "\n".join(drawn)
    label = "Spearman correlation between predicted and measured loss, for each score and proxy"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-label="{label}" font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f"{text(16, 20, label, 'start', 12)}\n{body}\n</svg>\n"
    )


def _cell(x: float, y: float, width: int, height: int, value: float | None) -> list[str]:
    if value is None:
        return []
    # White at 0, blue towards 1, orange towards -1: told apart also without red and green.
    share = min(abs(value), 1.0)
    far = (8, 81, 156) if value >= 0 else (204, 85, 0)
    color = "#" + "".join(f"{round(255 + (end - 255) * share):02x}" for end in far)
    fill = f'<rect x="{x:g}" y="{y:g}" width="{width - 1}" height="{height - 1}" fill="{color}"/>'
    return [fill, text(x + width / 2, y + 16, f"{value:.2f}", "middle", 11, light=share > 0.55)]


def text(x: float, y: float, words: str, anchor: str, size: int, *, bold: bool = False, light: bool = False) -> str:
    """An SVG text element; `anchor` is start, middle or end."""
    weight = ' font-weight="bold"' if bold else ""
    fill = "#ffffff" if light else "#1a1a1a"
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"{weight}>{words}</text>'


def _pivot(group: Sequence[Mapping[str, Any]], cell: Cell) -> str:
    scores, proxies = _axes(group)
    cells = {(_score(row), _proxy(row)): cell(row) for row in group}
    lines = [["score", *proxies], ["---", *("---:" for _ in proxies)]]
    lines += [[score, *(cells.get((score, proxy), "-") for proxy in proxies)] for score in scores]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _own_policies(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    """Agreements with the target's own policy, that itself among them."""
    foreign = agreements(runs)
    own = {
        (row["network"], row["method"], row["variant"]): {**row, "proxy": None, "top1": row["target_top1"], "same_pairs": 1.0}
        for row in foreign
    }
    return [*own.values(), *foreign]


def _axes(group: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(map(_score, group))), list(dict.fromkeys(map(_proxy, group)))


def _score(row: Mapping[str, Any]) -> str:
    return f"{row['method']}, {row['variant']}" if row["variant"] else str(row["method"])


def _proxy(row: Mapping[str, Any]) -> str:
    return str(row["proxy"]).partition(":")[0] if row["proxy"] else OWN


def _with_bounds(row: Mapping[str, Any]) -> str:
    low, high = row["spearman_loss_low"], row["spearman_loss_high"]
    return _number(row["spearman_loss"]) + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _regret(row: Mapping[str, Any]) -> str:
    return f"{row['regret']:.2f}"


def _own_policy(row: Mapping[str, Any]) -> str:
    return f"{row['top1']:.1f}; {row['same_pairs']:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _split(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _seeds(runs: Sequence[Run], row: Row, keys: Sequence[str]) -> dict[int, float]:
    return {run["seed"]: run["top1"] for run in runs if identity(run, keys) == identity(row.keys, keys)}


def _by_seed(rows: Sequence[Row], runs: Sequence[Run]) -> dict[tuple[Any, ...], dict[int, float]]:
    keys = ("method", "variant", "proxy")
    return {identity(row.keys, keys): _seeds(runs, row, keys) for row in rows}


def _against_uniform(top1: Mapping[tuple[Any, ...], Mapping[int, float]]) -> list[str]:
    uniform = [key for key in top1 if key[0] == "uniform"]
    if not uniform:
        return ["-" for _ in top1]
    best = max(uniform, key=lambda key: (len(top1[key]), statistics.fmean(top1[key].values())))
    return ["the best uniform row" if key == best else paired(top1[key], top1[best]) for key in top1]


def _against_whole(rows: Sequence[Row], top1: Mapping[tuple[Any, ...], Mapping[int, float]], target: str) -> list[str]:
    """Points and share of the seconds of the same search on all of the target's images."""
    seconds = {key: row.summaries["search_s"] for key, row in zip(top1, rows, strict=True)}
    cells = []
    for method, variant, proxy in top1:
        whole = (method, variant, target)
        own, all_s = seconds[method, variant, proxy], seconds.get(whole)
        if proxy is None or proxy == target or own is None or all_s is None:
            cells.append("-")
        else:
            cells.append(f"{paired(top1[method, variant, proxy], top1[whole])}; 1/{all_s.mean / own.mean:.0f}")
    return cells


def _pace(run: Run, runs: Sequence[Run]) -> dict[str, float]:
    """Final training loss of a rung, and after how many epochs it was at the base's final loss, if ever."""
    losses = [epoch["loss"] for epoch in value_of(run, "extra.trace")]
    base = next((other for other in runs if other["variant"] == "base" and other["seed"] == run["seed"]), None)
    pace = {"final_loss": losses[-1]}
    if base is not None:
        aim = base["extra"]["trace"][-1]["loss"]
        reached = next((at for at, loss in enumerate(losses, start=1) if loss <= aim), None)
        pace |= {} if reached is None else {"epochs_to_base": reached}
    return pace
