"""Charts of an analysis: error and noise layer by layer, and the values of a tensor on its grid."""

import math

from markupsafe import Markup

from bitscape.measure.analysis.result import Analysis
from bitscape.measure.analysis.tensors import TensorNoise
from bitscape.report.layer_charts import Bar, Bars, bar_panels
from bitscape.report.svg import Scale, line, picture, rect, text

WIDTH, HEIGHT, LEFT, TOP = 300, 150, 8, 24
"""Pixels of a histogram; its bars begin so far to the right, and so far down."""


def noise_panels(title: str, analysis: Analysis) -> Markup:
    """The outputs' error, each layer alone quantized; signal to noise of weights and inputs."""
    layers = analysis.layers
    error = {name: layer.alone.relative_error for name, layer in layers.items()}
    weight = {name: layer.noise.weight.sqnr_db for name, layer in layers.items()}
    input = {name: layer.noise.input.sqnr_db for name, layer in layers.items()}
    percent = {name: None if share is None else 100 * share for name, share in error.items()}
    panels = [
        _panel("% error of the outputs, this layer alone quantized", "work", percent, "%"),
        _panel("dB signal to noise of the weight", "weights", weight, "dB"),
        _panel("dB signal to noise of the input", "activations", input, "dB"),
    ]
    worst = analysis.by_error()[0]
    description = f"{len(layers)} layers; {worst} moves the outputs most by itself."
    return bar_panels(title, description, list(layers), panels)


def histogram(title: str, noise: TensorNoise) -> Markup:
    """Counts on a log scale, between the smallest and the largest value; dashes mark the ends of
    the grid.
    """
    low, high = _ends(noise)
    x = Scale(low=low, high=high, start=LEFT, end=WIDTH - LEFT)
    bottom = HEIGHT - 22
    y = Scale(low=0, high=math.log1p(max(noise.histogram)), start=bottom, end=TOP)
    step = (noise.high - noise.low) / len(noise.histogram)
    body = [text(LEFT, 14, title, "small strong")]
    for row, count in enumerate(noise.histogram):
        start = x(noise.low + row * step)
        wide = x(noise.low + (row + 1) * step) - start
        tall = bottom - y(math.log1p(count))
        if count:
            tip = f"{noise.low + row * step:.3g} to {noise.low + (row + 1) * step:.3g}: {count}"
            body.append(rect(start, bottom - tall, max(wide, 1), tall, "s0 mark", tip))
    body.append(line(LEFT, bottom, WIDTH - LEFT, bottom, "axis"))
    for end in (noise.clip_min, noise.clip_max):
        body.append(line(x(end), TOP, x(end), bottom + 4, "edge"))
    anchors = ((low, "start"), (high, "end"))
    body += [text(x(end), HEIGHT - 6, f"{end:.3g}", "small", anchor=side) for end, side in anchors]
    words = (
        f"Values from {noise.low:.3g} to {noise.high:.3g}; "
        f"the grid of {noise.bits} bits from {noise.clip_min:.3g} to {noise.clip_max:.3g}."
    )
    return picture(title, words, WIDTH, HEIGHT, body)


def _ends(noise: TensorNoise) -> tuple[float, float]:
    """Both the values and the grid."""
    return min(noise.low, noise.clip_min), max(noise.high, noise.clip_max)


def _panel(title: str, css: str, values: dict[str, float | None], unit: str) -> Bars:
    """A bar for each layer; none where the value is not known."""
    top = max((value for value in values.values() if value is not None), default=0.0) or 1.0
    bars = [
        Bar(value or 0.0, "-" if value is None else f"{value:.0f}", f"{name}: {_said(value, unit)}")
        for name, value in values.items()
    ]
    ticks = Scale(low=0, high=top, start=0, end=1).ticks(4)
    return Bars(title=title, css=css, top=top, ticks=ticks, bars=bars)


def _said(value: float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:.3g} {unit}"
