"""Charts of runs: curves of training, differences with their intervals, times."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from bitscape.report.compare import Comparison
from bitscape.report.svg import Scale, axes, dot, line, log_named, padded, path, picture, rect, text

SERIES = 8
"""Classes s0 to s7: colors, and dashes for those who do not see them."""
NARROW, ROW, MOST_LETTERS = 360, 36, 56
"""Pixels: width of charts that a phone shows whole, height of their rows; letters of names."""
MOST_POINTS = 150
"""Of a curve; more would not be seen."""


def curve_panel(
    title: str,
    curves: Mapping[str, tuple[int, Sequence[tuple[float, float]]]],
    *,
    log: bool = False,
) -> Markup:
    """Lines over epochs: name of a run -> its series, 0 to 7, and its points (epoch, value)."""
    width, height, left, bottom = 330, 220, 46, 182
    every = [point for _, points in curves.values() for point in points]
    log = log and min(value for _, value in every) > 0
    ends = padded([value for _, value in every], log=log)
    x = Scale(
        low=min(epoch for epoch, _ in every),
        high=max(epoch for epoch, _ in every),
        start=left + 6,
        end=width - 12,
    )
    y = Scale(low=ends[0], high=ends[1], start=bottom, end=30, log=log)
    body = [text(left, 14, log_named(title, log), "head"), *axes(x, y, "epoch", "", _whole)]
    for name, (series, points) in curves.items():
        places = [(x(epoch), y(value)) for epoch, value in _thinned(points)]
        tip = f"{name}: {points[-1][1]:.4g} after epoch {points[-1][0]:g}"
        body.append(path(places, f"s{series} curve", tip))
        body.append(dot(*places[-1], 2.5, f"s{series} mark", tip))
    lasts = ", ".join(f"{name} {points[-1][1]:.4g}" for name, (_, points) in curves.items())
    return picture(title, f"Last values: {lasts}.", width, height, body)


def interval_chart(compared: Sequence[Comparison]) -> Markup:
    """Mean differences in points of top-1, with their intervals, beside the line of zero.

    At least one has an interval.
    """
    drawn = [
        (each, each.difference)
        for each in compared
        if each.difference is not None and each.difference.interval is not None
    ]
    ends = padded([0.0, *(end for _, found in drawn for end in found.interval or ())])
    bottom = 4 + ROW * len(drawn)
    x = Scale(low=ends[0], high=ends[1], start=8, end=NARROW - 8)
    body = []
    for tick in x.ticks():
        words = f"{tick:+g}" if tick else "0"
        body += [
            line(x(tick), 4, x(tick), bottom, "grid"),
            text(x(tick), bottom + 15, words, "small", anchor="middle"),
        ]
    body += [line(x(0), 4, x(0), bottom, "axis")]
    for at, (each, found) in enumerate(drawn):
        y, (low, high) = 4 + ROW * at, found.interval or (0.0, 0.0)
        body += [text(8, y + 14, f"{each.own.method} minus {each.reference.method}", "small")]
        body += [
            rect(x(low), y + 24, x(high) - x(low), 4, "s0 mark"),
            dot(x(found.mean), y + 26, 5, "s0 mark", f"{found.mean:+.2f} points"),
        ]
    body += [
        text(
            NARROW / 2,
            bottom + 32,
            "points of top-1: mean and 95 % interval",
            "small",
            anchor="middle",
        )
    ]
    return picture(
        "Differences in top-1",
        "Mean differences with 95 % intervals; the sentences above say them.",
        NARROW,
        bottom + 42,
        body,
    )


def time_chart(times: Sequence[tuple[str, float]], title: str) -> Markup:
    """Milliseconds as bars from left to right, each below its name."""
    x = Scale(low=0, high=max(ms for _, ms in times), start=0, end=NARROW - 76)
    body = []
    for at, (name, ms) in enumerate(times):
        y, shown = ROW * at, name if len(name) <= MOST_LETTERS else "…" + name[1 - MOST_LETTERS :]
        body += [
            text(0, y + 13, shown, "small"),
            rect(0, y + 18, x(ms), 12, "s0 mark", f"{name}: {ms:.4g} ms"),
        ]
        body += [text(x(ms) + 6, y + 28, f"{ms:.4g} ms", "small")]
    return picture(
        title,
        f"Fastest: {min(times, key=lambda each: each[1])[0]}.",
        NARROW,
        ROW * len(times),
        body,
    )


def _whole(epoch: float) -> str:
    return f"{epoch:g}" if epoch == int(epoch) else ""


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(points) // MOST_POINTS)
    return [point for at, point in enumerate(points) if at % every == 0 or at == len(points) - 1]
