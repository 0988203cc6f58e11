"""Sections about layers: their bits, their costs, the scores of their bits."""

import math
from collections.abc import Mapping

from bitscape.cost.layers import LayerCost
from bitscape.cost.policy_cost import layer_cost
from bitscape.policy import LayerBits
from bitscape.report.blocks import Block, Figure, Missing, Section, Table, Text
from bitscape.report.charts import SERIES
from bitscape.report.depth_chart import DepthLayer, depth_chart
from bitscape.report.layer_charts import share_panels
from bitscape.report.layer_kinds import UNKNOWN, kind_of
from bitscape.report.material import Material
from bitscape.report.policies import CONTROLS, Shown
from bitscape.report.result_section import GIVE_POLICY
from bitscape.report.score_maps import Part, parts, score_map
from bitscape.searches.scores import ScoreTable
from bitscape.words import amount, cost_name, cost_text, listed, percent

GIVE_MODEL = (
    "Needs --model NAME, which counts what layers cost; with --input-shape CxHxW where no policy "
    "tells the shape"
)
MOST_DRAWN = 4
"""Policies whose layers are drawn."""


def bits_per_layer(material: Material) -> Section | Missing:
    """Section 2."""
    title = "Bits per layer"
    if material.chosen is None:
        return Missing(title=title, reason=GIVE_POLICY)
    shown = drawn_policies(material)
    blocks: list[Block] = [_depth_figure(material, each) for each in shown]
    order = material.in_call_order(shown[0].policy)
    rows = [[name, *(str(each.policy.layers[name]) for each in shown)] for name in order]
    columns = ["layer", *(each.name for each in shown)]
    caption = "Weight/activation bits as a table"
    blocks.append(Table(caption=caption, columns=columns, rows=rows, is_folded=True))
    if left := [each.name for each in material.policies if each not in shown]:
        blocks.append(Text(f"Not drawn: {listed(left)}."))
    return Section(anchor="bits", title=title, blocks=blocks)


def _depth_figure(material: Material, shown: Shown) -> Figure:
    """The bits of one policy over depth."""
    bits = material.in_call_order(shown.policy)
    least = _least(material, shown, bits)
    layers = {} if material.network is None else material.network.by_name
    kinds = {name: kind_of(layers[name]) if name in layers else UNKNOWN for name in bits}
    series = {kind: at % SERIES for at, kind in enumerate(dict.fromkeys(kinds.values()))}
    uniform = material.uniform
    drawn = [
        DepthLayer(
            name=name,
            bits=own,
            least=least.get(name, own),
            uniform=uniform[1].layers.get(name) if uniform else None,
            series=series[kinds[name]],
            costs=_disc_costs(layers[name], own) if name in layers else None,
        )
        for name, own in bits.items()
    ]
    caption = f"{listed(shown.names)}: {shown.method}, layers in call order"
    caption += "; the light part is what images decide about" if least else ""
    legend = [(f"s{at} mark", kind) for kind, at in series.items()] if layers else []
    legend += [("uniform curve", uniform[0])] if uniform else []
    picture = depth_chart(f"Bits per layer of {shown.name}", drawn)
    return Figure(caption=caption, pictures=[picture], legend=legend)


def _disc_costs(layer: LayerCost, bits: LayerBits) -> tuple[tuple[float, str], tuple[float, str]]:
    """Weight bytes and BitOps of a layer, as numbers and in words."""
    stored, computed = (layer_cost(kind, layer, bits) for kind in ("weight_bytes", "bitops"))
    return (
        (stored, cost_text("weight_bytes", stored)),
        (computed, f"{cost_text('bitops', computed)} BitOps"),
    )


def drawn_policies(material: Material) -> list[Shown]:
    """The chosen policy and up to three others that are no controls."""
    others = [
        each
        for each in material.policies
        if each is not material.chosen and not each.method.startswith(CONTROLS)
    ]
    return [*([material.chosen] if material.chosen else []), *others][:MOST_DRAWN]


def layer_costs(material: Material) -> Section | Missing:
    """Section 3."""
    title = "Cost by layer"
    if material.chosen is None or material.network is None:
        return Missing(title=title, reason=GIVE_POLICY if material.chosen is None else GIVE_MODEL)
    policy, layers = material.chosen.policy, material.network.layers
    costs = {
        kind: [layer_cost(kind, layer, policy.layers[layer.name]) for layer in layers]
        for kind in ("bitops", "weight_bytes")
    }
    totals = {kind: sum(own) or 1 for kind, own in costs.items()}
    shares = {
        cost_name(kind): {
            layer.name: (100 * value / totals[kind], cost_text(kind, value))
            for layer, value in zip(layers, own, strict=True)
        }
        for kind, own in costs.items()
    }
    rows = [
        [
            *(
                layer.name,
                layer.kind,
                amount(layer.weights),
                amount(layer.macs),
                str(policy.layers[layer.name]),
            ),
            *(
                words
                for kind in costs
                for words in (
                    cost_text(kind, costs[kind][at]),
                    percent(costs[kind][at], totals[kind]),
                )
            ),
        ]
        for at, layer in enumerate(layers)
    ]
    columns = ["layer", "kind", "weights", "MACs", "bits", "BitOps", "share", "bytes", "share"]
    figure = Figure(
        caption=f"Share of each layer in the cost of an image, at {material.chosen.name}",
        pictures=[share_panels("Cost by layer", shares)],
    )
    table = Table(caption="Costs as a table", columns=columns, rows=rows, left=2, is_folded=True)
    return Section(anchor="costs", title=title, blocks=[figure, table])


def sensitivity(material: Material) -> Section | Missing:
    """Section 6."""
    title = "Sensitivity of layers"
    if not material.inputs.scores:
        return Missing(title=title, reason="Needs the score file of `bitscape search --scores`")
    bits = material.chosen.policy.layers if material.chosen else {}
    blocks: list[Block] = []
    for name, table in material.inputs.scores.items():
        blocks += [_score_figure(name, table, part, bits) for part in parts(table)]
        rows = [
            [layer, *(_score(value) for value in row)]
            for layer, row in zip(table.layers, table.values.tolist(), strict=True)
        ]
        columns = ["layer", *map(str, table.candidates)]
        caption = f"Scores of {name} as a table"
        blocks.append(Table(caption=caption, columns=columns, rows=rows, is_folded=True))
    return Section(anchor="sensitivity", title=title, blocks=blocks)


def _score_figure(
    name: str, table: ScoreTable, part: Part, bits: Mapping[str, LayerBits]
) -> Figure:
    caption = f"{name}: score of each layer ({table.method}) by {part.title}"
    caption += "; frames: the chosen bits" if bits else ""
    if (table.values < 0).any():
        caption += "; shown is how far a score lies above the best of its layer"
    drawn = score_map(f"Scores of {name}: {part.title}", table, part, bits)
    return Figure(caption=caption, pictures=[drawn])


def _least(material: Material, shown: Shown, bits: dict[str, LayerBits]) -> dict[str, LayerBits]:
    """Layer -> the least bits that images may give it, for a dynamic network."""
    run = next(
        (
            run
            for name, run in material.inputs.runs.items()
            if name in shown.names and run.dynamic is not None
        ),
        None,
    )
    if run is None or run.dynamic is None:
        return {}
    names = list(bits)
    static = run.dynamic.static if run.dynamic.static is not None else (names[0], names[-1])
    low = run.dynamic.low
    return {
        name: LayerBits(low if run.dynamic.weights else own.weight, low)
        for name, own in bits.items()
        if name not in static
    }


def _score(value: float) -> str:
    return "forbidden" if math.isinf(value) else f"{value:.3g}"
