"""Charts of policies over what they cost: the metric that was measured, and the expected loss."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitscape.report.front import ComparedFront, Point
from bitscape.report.measured import CHOSEN, FLOAT, OTHER, RANDOM, UNIFORM, Measurements
from bitscape.report.svg import (
    Scale,
    axes,
    dot,
    line,
    log_named,
    padded,
    path,
    picture,
    rect,
    text,
)
from bitscape.words import cost_name, cost_text

WIDE, HIGH = 420, 310
"""Pixels: charts of policies, which shrink a little on a phone."""
LETTER, LINE, OFFSET = 6.2, 12, 11
"""Pixels: of a label a letter, a line, the way from its mark."""
Place = tuple[float, float]
COLORS = {CHOSEN: "s0", UNIFORM: "s1", RANDOM: "s2", OTHER: "s3"}
"""Role of a measurement -> class of its color."""


@dataclass(frozen=True)
class Plane:
    """Two scales, and the picture around them."""

    x: Scale
    y: Scale


def front_plane(front: ComparedFront) -> Plane:
    """The scales of `front_chart`: logarithmic where all values are positive."""
    points = front_points(front)
    costs, scores = [point.cost for point in points], [point.score for point in points]
    return _plane(costs, scores, log_x=min(costs) > 0, log_y=min(scores) > 0)


def front_points(front: ComparedFront) -> list[Point]:
    """Every point of a front."""
    chosen = [front.chosen] if front.chosen else []
    return [*front.best, *front.uniform, *front.random, *chosen]


def front_chart(front: ComparedFront) -> Markup:
    """Score over cost: the front as a line, uniform policies as squares, random ones as a range,
    the chosen one as a ring. A mark that the page's script moves is hidden until then.
    """
    plane = front_plane(front)
    x, y = plane.x, plane.y

    def tip(point: Point, name: str) -> str:
        return f"{name}: {cost_text(front.kind, point.cost)}, score {point.score:.4g}"

    below = log_named(cost_name(front.kind), x.log)
    beside = log_named(f"score ({front.method})", y.log)
    body = axes(x, y, below, beside, lambda tick: cost_text(front.kind, tick))
    places = [(x(point.cost), y(point.score)) for point in front.best]
    body.append(path(places, "s0 curve", "Pareto front"))
    for point in front.best:
        body.append(dot(x(point.cost), y(point.score), 2.5, "s0 mark", tip(point, "front")))
    labels = []
    if front.random:
        body += _range(front, x, y)
        labels.append(Label(_middle_cost(front, x), y(front.median), "random"))
    for point in front.uniform:
        px, py = x(point.cost), y(point.score)
        body.append(rect(px - 4, py - 4, 8, 8, "s1 mark", tip(point, f"uniform {point.name}")))
        labels.append(Label(px, py, point.name))
    if front.chosen:
        px, py = x(front.chosen.cost), y(front.chosen.score)
        body.append(dot(px, py, 7, "ring", tip(front.chosen, "chosen")))
        labels.append(Label(px, py, "chosen", is_strong=True))
    moved = dot(*places[0], 5, "here", "at the slider")
    body += [*written(labels, [(label.x, label.y) for label in labels], x), moved]
    words = (
        f"{len(front.best)} policies on the front, {len(front.uniform)} uniform ones, "
        f"{len(front.random)} random ones."
    )
    return picture(f"Score over {cost_name(front.kind)}", words, WIDE, HIGH, body)


def measured_chart(measurements: Measurements) -> Markup:
    """The metric over the size of the weights, with 95 % intervals; float as a dashed line."""
    in_float = measurements.of(FLOAT)[:1]
    ends = [end for one in measurements.all if one.role != RANDOM for end in one.interval or ()]
    sizes = [float(one.bytes or 0) for one in measurements.sized]
    log = min(sizes) > 0 and max(sizes) > 8 * min(sizes)
    plane = _plane(sizes, [*(one.value for one in measurements.all), *ends], log_x=log, log_y=False)
    x, y = plane.x, plane.y
    body = axes(
        *(x, y, log_named(cost_name("weight_bytes"), log), measurements.metric),
        lambda tick: cost_text("weight_bytes", tick),
    )
    labels: list[Label] = []
    for one in in_float:
        body.append(line(x.start, y(one.value), x.end, y(one.value), "float"))
    order = (OTHER, RANDOM, UNIFORM, CHOSEN)
    marks = []
    for one in sorted(measurements.sized, key=lambda one: order.index(one.role)):
        px, py = x(float(one.bytes or 0)), y(one.value)
        size = cost_text("weight_bytes", one.bytes)
        tip = f"{one.name}: {size}, {measurements.metric} {measurements.text(one.value)}"
        if one.interval and one.role != RANDOM:
            low, high = one.interval
            body.append(line(px, y(low), px, y(high), f"whisker {COLORS[one.role]}"))
            tip += f", 95 % interval {measurements.text(low)} to {measurements.text(high)}"
        body.append(_mark(one.role, px, py, tip))
        marks.append((px, py))
        words = RANDOM if one.role == RANDOM else one.name.removeprefix("uniform ")
        if not (one.role == RANDOM and any(label.words == words for label in labels)):
            labels.append(Label(px, py, words, is_strong=one.role == CHOSEN))
    for one in in_float:
        words = f"float {measurements.text(one.value)}"
        body.append(text(x.end, y(one.value) - 5, words, "small lifted", anchor="end"))
    values = [f"{one.name} {measurements.text(one.value)}" for one in measurements.all]
    title = f"{measurements.metric} over the size of the weights"
    return picture(title, f"{', '.join(values)}.", WIDE, HIGH, [*body, *written(labels, marks, x)])


def _mark(role: str, x: float, y: float, tip: str) -> str:
    """The chosen network has a ring around its dot, uniform bits are squares."""
    css = f"{COLORS[role]} mark"
    if role == UNIFORM:
        return rect(x - 4.5, y - 4.5, 9, 9, css, tip)
    mark = dot(x, y, 4 if role == CHOSEN else 3.5, css, tip)
    return mark + dot(x, y, 7.5, "ring", tip) if role == CHOSEN else mark


@dataclass(frozen=True)
class Label:
    """Words beside a mark."""

    x: float
    y: float
    words: str
    is_strong: bool = False


def written(labels: Sequence[Label], marks: Sequence[Place], x: Scale) -> list[str]:
    """Write labels beside their marks: right of them, else left, else below what is in the way."""
    parts: list[str] = []
    taken = [(px - OFFSET / 2, px + OFFSET / 2, py) for px, py in marks]
    for label in sorted(labels, key=lambda label: label.y):
        wide = len(label.words) * LETTER
        sides = [("start", label.x + OFFSET), ("end", label.x - OFFSET - wide)]
        fitting = [side for side in sides if _fits(side[1], wide, x)]
        spots = [(*side, _free(taken, side[1], wide, label.y)) for side in fitting or sides]
        anchor, start, y = min(spots, key=lambda spot: spot[2])
        taken.append((start, start + wide, y))
        css = "small strong lifted" if label.is_strong else "small lifted"
        parts.append(
            text(
                start if anchor == "start" else start + wide, y + 4, label.words, css, anchor=anchor
            )
        )
    return parts


def _fits(start: float, wide: float, x: Scale) -> bool:
    """Whether a label lies in the picture."""
    return start >= 0 and start + wide <= x.end + OFFSET


def _free(
    taken: Sequence[tuple[float, float, float]], start: float, wide: float, y: float
) -> float:
    """Return the first height from `y` downwards where a label lies on nothing."""
    while clash := [
        other
        for low, high, other in taken
        if low < start + wide and start < high and abs(other - y) < LINE
    ]:
        y = max(clash) + LINE
    return y


def _plane(xs: Sequence[float], ys: Sequence[float], *, log_x: bool, log_y: bool) -> Plane:
    x_ends, y_ends = padded(xs, log=log_x), padded(ys, log=log_y)
    return Plane(
        x=Scale(low=x_ends[0], high=x_ends[1], start=58, end=WIDE - 14, log=log_x),
        y=Scale(low=y_ends[0], high=y_ends[1], start=HIGH - 46, end=14, log=log_y),
    )


def _range(front: ComparedFront, x: Scale, y: Scale) -> list[str]:
    """The random policies: a bar from the best to the worst score, a stroke at the median."""
    scores = [point.score for point in front.random]
    px = _middle_cost(front, x)
    low, high, middle = y(min(scores)), y(max(scores)), y(front.median)
    spread = f"from {min(scores):.4g} to {max(scores):.4g}"
    tip = f"{len(scores)} random policies: median {front.median:.4g}, {spread}"
    return [
        rect(px - 3, high, 6, max(low - high, 1), "s2 light", tip),
        rect(px - 8, middle - 2, 16, 4, "s2 mark", tip),
    ]


def _middle_cost(front: ComparedFront, x: Scale) -> float:
    return x(sorted(point.cost for point in front.random)[len(front.random) // 2])
