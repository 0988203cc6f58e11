"""The section about where the error of a quantized network comes from."""

from bitscape.measure.analysis.result import Analysis
from bitscape.report.blocks import Block, Figure, Missing, Section, Table, Text
from bitscape.report.material import Material
from bitscape.report.noise_charts import histogram, noise_panels

DRAWN = 4
"""Layers whose values are drawn."""


def error_by_layer(material: Material) -> Section | Missing:
    """Section 7."""
    title = "Error by layer"
    if not material.inputs.analyses:
        return Missing(title=title, reason="Needs the .json of `bitscape analyze --out`")
    blocks: list[Block] = []
    for name, analysis in material.inputs.analyses.items():
        blocks += _analysis(name, analysis)
    return Section(anchor="analysis", title=title, blocks=blocks)


def _analysis(name: str, analysis: Analysis) -> list[Block]:
    worst = analysis.by_error()[:DRAWN]
    first = analysis.layers[worst[0]]
    table = analysis.layer_table()
    pictures = [
        histogram(f"{kind} of {layer}, {noise.bits} bits", noise)
        for layer in worst
        for kind, noise in (
            ("weight", analysis.layers[layer].noise.weight),
            ("input", analysis.layers[layer].noise.input),
        )
    ]
    return [
        Text(
            f"{worst[0]}, at {first.bits} bits, moves the outputs most by itself; most of its "
            f"noise is from its {first.noisier}.",
            True,
        ),
        Text(f"{table.note}."),
        Figure(
            caption=f"{name}: {table.title}",
            pictures=[noise_panels(f"Error of {name}", analysis)],
        ),
        Figure(
            caption="Values of the layers that move the outputs most, counts on a log scale; "
            "dashes mark the ends of the grid, of a weight those of its widest channel",
            pictures=pictures,
        ),
        Table(
            caption="Layers by the error that each causes alone",
            columns=table.columns,
            rows=table.rows,
            is_folded=True,
        ),
    ]
