"""Charts as SVG text: shapes with CSS classes, so that the page decides on colors, and axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

NAMESPACE = "http://www.w3.org/2000/svg"


def picture(
    title: str, description: str, width: float, height: float, body: Sequence[str]
) -> Markup:
    """A whole SVG of a fixed size in pixels, with words for those who do not see it."""
    inner = "\n".join(body)
    return Markup(
        f'<svg xmlns="{NAMESPACE}" role="img" width="{_px(width)}" height="{_px(height)}" '
        f'viewBox="0 0 {_px(width)} {_px(height)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>\n{inner}\n</svg>"
    )


def text(
    x: float, y: float, words: str, css: str = "", *, anchor: str = "start", turn: float = 0
) -> str:
    """Words; `turn` in degrees, clockwise around their anchor."""
    turned = f' transform="rotate({turn:g} {_px(x)} {_px(y)})"' if turn else ""
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{_px(x)}" y="{_px(y)}"{anchored}{_css(css)}{turned}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, css: str, tip: str = "") -> str:
    """A box; `tip` shows under the pointer."""
    box = f'<rect x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" height="{_px(height)}"{_css(css)}'
    return f"{box}><title>{escape(tip)}</title></rect>" if tip else f"{box}/>"


def group(body: Sequence[str], data: Mapping[str, object]) -> str:
    """Shapes together, with data that a script reads."""
    values = {name: _px(own) if isinstance(own, float) else own for name, own in data.items()}
    told = "".join(f' data-{name}="{escape(str(own))}"' for name, own in values.items())
    return f"<g{told}>{''.join(body)}</g>"


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{_px(x1)}" y1="{_px(y1)}" x2="{_px(x2)}" y2="{_px(y2)}"{_css(css)}/>'


def path(points: Sequence[tuple[float, float]], css: str, tip: str = "") -> str:
    """A line through points."""
    places = " ".join(f"{_px(x)},{_px(y)}" for x, y in points)
    return f'<polyline points="{places}"{_css(css)}><title>{escape(tip)}</title></polyline>'


def dot(x: float, y: float, radius: float, css: str, tip: str = "") -> str:
    """A filled circle."""
    circle = f'<circle cx="{_px(x)}" cy="{_px(y)}" r="{radius:g}"{_css(css)}>'
    return f"{circle}<title>{escape(tip)}</title></circle>"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    log: bool = False
    """All values are then above 0."""

    def __call__(self, value: float) -> float:
        """The pixel of a value; equal ends have the middle."""
        low, high, value = (
            math.log(each) if self.log else each for each in (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values between the ends."""
        found = _log_ticks(self.low, self.high) if self.log else []
        return found if 3 <= len(found) <= 2 * count else _linear_ticks(self.low, self.high, count)


FARTHEST = 1e100
"""No axis reaches beyond."""


def padded(
    values: Sequence[float], *, log: bool = False, share: float = 0.06
) -> tuple[float, float]:
    """The ends of an axis a little beyond the values.

    They are never so far apart that their difference or ratio overflows.
    """
    low, high = (min(max(end, -FARTHEST), FARTHEST) for end in (min(values), max(values)))
    if log:
        low, high = max(low, 1 / FARTHEST), max(high, 1 / FARTHEST)
    if log:
        room = max((high / low) ** share, 1.05)
        return low / room, high * room
    room = share * (high - low) or max(abs(high), 1.0) * share
    return low - room, high + room


def axes(x: Scale, y: Scale, below: str, beside: str, words: Callable[[float], str]) -> list[str]:
    """Both axes with their ticks; `words` writes those of x, "" leaves one out."""
    bottom, left = y.start, x.start
    parts = []
    for tick in y.ticks():
        parts += [
            line(left, y(tick), x.end, y(tick), "grid"),
            text(left - 6, y(tick) + 4, _tick(tick), "small", anchor="end"),
        ]
    for tick in filter(words, x.ticks()):
        parts += [
            line(x(tick), bottom, x(tick), bottom + 4, "axis"),
            text(x(tick), bottom + 16, words(tick), "small", anchor="middle"),
        ]
    parts += [
        line(left, bottom, x.end, bottom, "axis"),
        text((left + x.end) / 2, bottom + 34, below, "small", anchor="middle"),
    ]
    return (
        [*parts, text(14, (bottom + y.end) / 2, beside, "small", anchor="middle", turn=-90)]
        if beside
        else parts
    )


def log_named(title: str, log: bool) -> str:
    """A title, with the kind of its scale."""
    return f"{title}, log scale" if log else title


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1,) if high / low > 1e4 else (1, 3) if high / low > 30 else (1, 2, 5)
    return [
        value
        for decade in decades
        for digit in leading
        if low <= (value := digit * 10.0**decade) <= high
    ]


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    return [
        round(at * step, 12) for at in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def _px(value: float) -> str:
    return f"{round(value, 1):g}" if abs(value) < 1e5 else f"{value:.0f}"


def _css(css: str) -> str:
    return f' class="{css}"' if css else ""


def _tick(value: float) -> str:
    return (
        f"{value:g}"
        if value == 0 or 1e-3 <= abs(value) < 1e5
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
