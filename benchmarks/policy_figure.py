"""A searched policy as SVG: the weight bits of each layer over depth, and below them its share of the weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

import recipes.networks
from benchmarks.transfer_summaries import text
from bitscape.errors import BitscapeError

NETWORK, BUDGET, UNIFORM = "mobilenetv2_tfslim", "4bit", 4
TITLE = "MobileNetV2 within the bytes of 4-bit weights: bits of each layer's weights, as searched by fisher"
COLORS = {"first layer": "#6b7280", "1×1": "#0b5394", "depthwise": "#d97706", "classifier": "#6b7280"}
"""Kind of layer -> color; first layer and classifier have their names beside them."""
WIDTH, LEFT, STEP, BAR = 760, 46, 13, 10
"""Pixels: width of the figure, place of the first bar, from bar to bar, width of a bar."""
BASE, BIT, SHARE = 234, 21, 1.6
"""Pixels: y of 0 bits, height of a bit, height of a percent of the weights."""


def policy_figure(runs: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the policy that `fisher` found for MobileNetV2, from the runs of the benchmark tasks.

    Raises:
        BitscapeError: no such run.
    """
    searched = (run for run in runs if (run["network"], run["method"], run.get("variant")) == (NETWORK, "fisher", BUDGET))
    run = next(searched, None)
    if run is None:
        raise BitscapeError(f"tasks.jsonl holds no search of {NETWORK} at {BUDGET}; python -m benchmarks.tasks makes it")
    modules = dict(getattr(recipes.networks, NETWORK)().named_modules())
    layers = {name: (modules[name], weight_bits) for name, (weight_bits, _) in run["policy"].items()}
    weights = {name: layer.get_parameter("weight").numel() for name, (layer, _) in layers.items()}
    shares = {name: 100 * number / sum(weights.values()) for name, number in weights.items()}
    body = "\n".join([*_scale(list(shares.values())), *_bars(layers, shares), *_legend(len(layers))])
    height = BASE + 84
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{TITLE}" font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def kind(layer: nn.Module) -> str:
    """What the layer is, of `COLORS`."""
    if isinstance(layer, nn.Linear):
        return "classifier"
    assert isinstance(layer, nn.Conv2d)
    if layer.groups > 1:
        return "depthwise"
    return "1×1" if layer.kernel_size == (1, 1) else "first layer"


def _bars(layers: Mapping[str, tuple[nn.Module, int]], shares: Mapping[str, float]) -> Iterator[str]:
    """Two bars for each layer: its bits upwards, its share of the weights, in percent, downwards."""
    for index, (name, (layer, bits)) in enumerate(layers.items()):
        x, color = LEFT + index * STEP, COLORS[kind(layer)]
        yield (
            f'<g class="layer"><title>{name}: {bits} bits, {shares[name]:.2f} % of the weights</title>'
            f'<rect x="{x}" y="{BASE - bits * BIT}" width="{BAR}" height="{bits * BIT}" fill="{color}"/>'
            f'<rect x="{x}" y="{BASE + 8}" width="{BAR}" height="{max(shares[name] * SHARE, 0.5):.1f}" fill="{color}" opacity="0.55"/></g>'
        )


def _scale(shares: Sequence[float]) -> Iterator[str]:
    end = LEFT + len(shares) * STEP
    for bits in (2, 4, 6, 8):
        y = BASE - bits * BIT
        yield f'<path d="M{LEFT - 6},{y}H{end}" stroke="#e5e7eb"/>'
        yield text(LEFT - 12, y + 4, str(bits), "end", 11)
    yield text(LEFT, BASE + 26, "share of the weights", "start", 11)
    yield text(end - STEP - 6, BASE + 62, f"classifier: {shares[-1]:.0f} %", "end", 11)


def _legend(count: int) -> Iterator[str]:
    y = BASE - UNIFORM * BIT
    yield f'<path d="M{LEFT - 6},{y}H{LEFT + count * STEP}" stroke="#1a1a1a" stroke-dasharray="4 3"/>'
    yield text(16, 22, TITLE, "start", 13, bold=True)
    x = LEFT
    for name in ("depthwise", "1×1"):
        yield f'<rect x="{x}" y="35" width="10" height="10" fill="{COLORS[name]}"/>'
        yield text(x + 15, 44, f"{name} convolution", "start", 11)
        x += 150
    yield f'<path d="M{x},40h24" stroke="#1a1a1a" stroke-dasharray="4 3"/>'
    yield text(x + 30, 44, "uniform 4 bits, the same bytes", "start", 11)
