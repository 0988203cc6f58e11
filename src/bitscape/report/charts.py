"""Charts with two axes: the Pareto front, curves of training, differences with their intervals, times."""

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from bitscape.report.compare import Comparison
from bitscape.report.front import ComparedFront, Point
from bitscape.report.svg import Scale, dot, line, padded, path, picture, rect, text
from bitscape.words import cost_name, cost_text

SERIES = 8
"""Classes s0 to s7: colors, and dashes for those who do not see them."""
NARROW, ROW, MOST_LETTERS = 360, 36, 56
"""Pixels: width of charts that a phone shows whole, height of their rows; letters of the names in these."""
MOST_POINTS = 150
"""Of a curve; more would not be seen."""


def front_chart(front: ComparedFront) -> Markup:
    """Score over cost: the front as a line, uniform policies as squares, random ones as a range, the chosen one as a ring."""
    width, height, left, bottom = 640, 400, 74, 350
    points = [*front.best, *front.uniform, *front.random, *([front.chosen] if front.chosen else [])]
    log = min(point.score for point in points) > 0
    log_cost = min(point.cost for point in points) > 0
    x_ends = padded([point.cost for point in points], log=log_cost)
    y_ends = padded([point.score for point in points], log=log)
    x = Scale(low=x_ends[0], high=x_ends[1], start=left, end=width - 14, log=log_cost)
    y = Scale(low=y_ends[0], high=y_ends[1], start=bottom, end=16, log=log)

    def tip(point: Point, name: str) -> str:
        return f"{name}: {cost_text(front.kind, point.cost)}, score {point.score:.4g}"

    below, beside = _named(cost_name(front.kind), log_cost), _named(f"score ({front.method})", log)
    body = _axes(x, y, below, beside, lambda tick: cost_text(front.kind, tick))
    body.append(path([(x(point.cost), y(point.score)) for point in front.best], "s0 curve", "Pareto front"))
    body += [dot(x(point.cost), y(point.score), 2.5, "s0 mark", tip(point, "front")) for point in front.best]
    if front.random:
        body += _range(front, x, y)
    for point in front.uniform:
        px, py = x(point.cost), y(point.score)
        body += [rect(px - 4, py - 4, 8, 8, "s1 mark", tip(point, f"uniform {point.name}")), text(px + 8, py - 5, point.name, "small")]
    if front.chosen:
        px, py = x(front.chosen.cost), y(front.chosen.score)
        body += [dot(px, py, 7, "ring", tip(front.chosen, "chosen")), text(px - 11, py + 16, "chosen", "small strong", anchor="end")]
    words = f"{len(front.best)} policies on the front, {len(front.uniform)} uniform ones, {len(front.random)} random ones."
    return picture(f"Score over {cost_name(front.kind)}", words, width, height, body)


def curve_panel(title: str, curves: Mapping[str, tuple[int, Sequence[tuple[float, float]]]], *, log: bool = False) -> Markup:
    """Lines over epochs: name of a run -> its series, 0 to 7, and its points (epoch, value)."""
    width, height, left, bottom = 330, 220, 46, 182
    every = [point for _, points in curves.values() for point in points]
    log = log and min(value for _, value in every) > 0
    ends = padded([value for _, value in every], log=log)
    x = Scale(low=min(epoch for epoch, _ in every), high=max(epoch for epoch, _ in every), start=left + 6, end=width - 12)
    y = Scale(low=ends[0], high=ends[1], start=bottom, end=30, log=log)
    body = [text(left, 14, _named(title, log), "head"), *_axes(x, y, "epoch", "", _whole)]
    for name, (series, points) in curves.items():
        places = [(x(epoch), y(value)) for epoch, value in _thinned(points)]
        tip = f"{name}: {points[-1][1]:.4g} after epoch {points[-1][0]:g}"
        body.append(path(places, f"s{series} curve", tip))
        body.append(dot(*places[-1], 2.5, f"s{series} mark", tip))
    lasts = ", ".join(f"{name} {points[-1][1]:.4g}" for name, (_, points) in curves.items())
    return picture(title, f"Last values: {lasts}.", width, height, body)


def interval_chart(compared: Sequence[Comparison]) -> Markup:
    """Mean differences in points of top-1, with their intervals, beside the line of zero; at least one has an interval."""
    drawn = [(each, each.difference) for each in compared if each.difference is not None and each.difference.interval is not None]
    ends = padded([0.0, *(end for _, found in drawn for end in found.interval or ())])
    bottom = 4 + ROW * len(drawn)
    x = Scale(low=ends[0], high=ends[1], start=8, end=NARROW - 8)
    body = []
    for tick in x.ticks():
        words = f"{tick:+g}" if tick else "0"
        body += [line(x(tick), 4, x(tick), bottom, "grid"), text(x(tick), bottom + 15, words, "small", anchor="middle")]
    body += [line(x(0), 4, x(0), bottom, "axis")]
    for at, (each, found) in enumerate(drawn):
        y, (low, high) = 4 + ROW * at, found.interval or (0.0, 0.0)
        body += [text(8, y + 14, f"{each.own.method} minus {each.reference.method}", "small")]
        body += [
            rect(x(low), y + 24, x(high) - x(low), 4, "s0 mark"),
            dot(x(found.mean), y + 26, 5, "s0 mark", f"{found.mean:+.2f} points"),
        ]
    body += [text(NARROW / 2, bottom + 32, "points of top-1: mean and 95 % interval", "small", anchor="middle")]
    return picture("Differences in top-1", "Mean differences with 95 % intervals; the sentences above say them.", NARROW, bottom + 42, body)


def time_chart(times: Sequence[tuple[str, float]], title: str) -> Markup:
    """Milliseconds as bars from left to right, each below its name."""
    x = Scale(low=0, high=max(ms for _, ms in times), start=0, end=NARROW - 76)
    body = []
    for at, (name, ms) in enumerate(times):
        y, shown = ROW * at, name if len(name) <= MOST_LETTERS else "…" + name[1 - MOST_LETTERS :]
        body += [text(0, y + 13, shown, "small"), rect(0, y + 18, x(ms), 12, "s0 mark", f"{name}: {ms:.4g} ms")]
        body += [text(x(ms) + 6, y + 28, f"{ms:.4g} ms", "small")]
    return picture(title, f"Fastest: {min(times, key=lambda each: each[1])[0]}.", NARROW, ROW * len(times), body)


def _axes(x: Scale, y: Scale, below: str, beside: str, words: Callable[[float], str]) -> list[str]:
    """Both axes with their ticks; `words` writes those of x, and leaves out those for which it returns ""."""
    bottom, left = y.start, x.start
    parts = []
    for tick in y.ticks():
        parts += [line(left, y(tick), x.end, y(tick), "grid"), text(left - 6, y(tick) + 4, _tick(tick), "small", anchor="end")]
    for tick in filter(words, x.ticks()):
        parts += [line(x(tick), bottom, x(tick), bottom + 4, "axis"), text(x(tick), bottom + 16, words(tick), "small", anchor="middle")]
    parts += [line(left, bottom, x.end, bottom, "axis"), text((left + x.end) / 2, bottom + 34, below, "small", anchor="middle")]
    return [*parts, text(14, (bottom + y.end) / 2, beside, "small", anchor="middle", turn=-90)] if beside else parts


def _named(title: str, log: bool) -> str:
    return f"{title}, log scale" if log else title


def _whole(epoch: float) -> str:
    return f"{epoch:g}" if epoch == int(epoch) else ""


def _tick(value: float) -> str:
    return f"{value:g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _range(front: ComparedFront, x: Scale, y: Scale) -> list[str]:
    """The random policies: a bar from the best to the worst score, a stroke at the median."""
    scores = [point.score for point in front.random]
    px = x(sorted(point.cost for point in front.random)[len(scores) // 2])
    low, high, middle = y(min(scores)), y(max(scores)), y(front.median)
    tip = f"{len(scores)} random policies: median {front.median:.4g}, from {min(scores):.4g} to {max(scores):.4g}"
    words = text(px - 11, middle + 4, "random", "small", anchor="end")
    return [rect(px - 3, high, 6, max(low - high, 1), "s2 light", tip), rect(px - 8, middle - 2, 16, 4, "s2 mark", tip), words]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(points) // MOST_POINTS)
    return [point for at, point in enumerate(points) if at % every == 0 or at == len(points) - 1]
