"""Sections about layers: their bits, their costs, the front of their scores, the scores themselves."""

import math

from bitscape.cost.policy_cost import layer_cost
from bitscape.policy import LayerBits
from bitscape.report.blocks import Block, Figure, Missing, Section, Table, Text
from bitscape.report.charts import front_chart
from bitscape.report.front import ComparedFront, Point, front_of
from bitscape.report.layer_charts import bits_panels, score_map, share_panels
from bitscape.report.material import Material, without_latency
from bitscape.report.policies import CONTROLS, Shown
from bitscape.report.result_section import GIVE_POLICY
from bitscape.searches.scores import ScoreTable
from bitscape.words import amount, cost_name, cost_text, listed, percent

GIVE_MODEL = "Needs --model NAME, which counts what layers cost; with --input-shape CxHxW where no policy tells the shape"
MOST_DRAWN = 4
"""Policies whose layers are drawn."""


def bits_per_layer(material: Material) -> Section | Missing:
    """Section 2."""
    title = "Bits per layer"
    if material.chosen is None:
        return Missing(title=title, reason=GIVE_POLICY)
    shown = drawn_policies(material)
    blocks: list[Block] = []
    for each in shown:
        bits = material.in_call_order(each.policy)
        least = _least(material, each, bits)
        caption = f"{listed(each.names)}: {each.method}, layers in call order"
        caption += "; the light part of a bar is what images decide about" if least else ""
        blocks.append(Figure(caption=caption, pictures=[bits_panels(f"Bits per layer of {each.name}", bits, least)]))
    rows = [[name, *(str(each.policy.layers[name]) for each in shown)] for name in material.in_call_order(shown[0].policy)]
    columns = ["layer", *(each.name for each in shown)]
    blocks.append(Table(caption="Weight/activation bits as a table", columns=columns, rows=rows, is_folded=True))
    if left := [each.name for each in material.policies if each not in shown]:
        blocks.append(Text(f"Not drawn: {listed(left)}."))
    return Section(anchor="bits", title=title, blocks=blocks)


def drawn_policies(material: Material) -> list[Shown]:
    """The chosen policy and up to three others that are no controls."""
    others = [each for each in material.policies if each is not material.chosen and not each.method.startswith(CONTROLS)]
    return [*([material.chosen] if material.chosen else []), *others][:MOST_DRAWN]


def layer_costs(material: Material) -> Section | Missing:
    """Section 3."""
    title = "Cost by layer"
    if material.chosen is None or material.network is None:
        return Missing(title=title, reason=GIVE_POLICY if material.chosen is None else GIVE_MODEL)
    policy, layers = material.chosen.policy, material.network.layers
    costs = {kind: [layer_cost(kind, layer, policy.layers[layer.name]) for layer in layers] for kind in ("bitops", "weight_bytes")}
    totals = {kind: sum(own) or 1 for kind, own in costs.items()}
    shares = {
        cost_name(kind): {
            layer.name: (100 * value / totals[kind], cost_text(kind, value)) for layer, value in zip(layers, own, strict=True)
        }
        for kind, own in costs.items()
    }
    rows = [
        [
            *(layer.name, layer.kind, amount(layer.weights), amount(layer.macs), str(policy.layers[layer.name])),
            *(words for kind in costs for words in (cost_text(kind, costs[kind][at]), percent(costs[kind][at], totals[kind]))),
        ]
        for at, layer in enumerate(layers)
    ]
    columns = ["layer", "kind", "weights", "MACs", "bits", "BitOps", "share", "bytes", "share"]
    figure = Figure(
        caption=f"Share of each layer in the cost of one image at the bits of {material.chosen.name}",
        pictures=[share_panels("Cost by layer", shares)],
    )
    table = Table(caption="Costs as a table", columns=columns, rows=rows, left=2, is_folded=True)
    return Section(anchor="costs", title=title, blocks=[figure, table])


def pareto(material: Material) -> Section | Missing:
    """Section 4."""
    title = "What the scores promise at each cost"
    table = _own_scores(material)
    if table is None:
        return Missing(title=title, reason="Needs the score file of `bitscape search --scores`")
    if material.network is None:
        return Missing(title=title, reason=GIVE_MODEL)
    if "latency_ms" in material.caps and not material.network.has_latency:
        return Missing(title=title, reason="Needs the latency table, which the budget of the policy caps")
    policy = material.chosen.policy if material.chosen else None
    network = material.network if "latency_ms" in material.caps else without_latency(material.network)
    front = front_of(table, network, policy, material.caps)
    figure = Figure(caption=_front_caption(front), pictures=[front_chart(front)], legend=_front_legend(front))
    rows = [_point_row(front, "front", point) for point in front.best]
    rows += [_point_row(front, f"uniform {point.name}", point) for point in front.uniform]
    rows += [_point_row(front, point.name, point) for point in front.random]
    rows += [_point_row(front, "chosen", front.chosen)] if front.chosen else []
    numbers = Table(caption="Points as a table", columns=["policy", cost_name(front.kind), "score"], rows=rows, is_folded=True)
    return Section(anchor="front", title=title, blocks=[Text(_front_words(front)), figure, numbers])


def sensitivity(material: Material) -> Section | Missing:
    """Section 6."""
    title = "Sensitivity of layers"
    if not material.inputs.scores:
        return Missing(title=title, reason="Needs the score file of `bitscape search --scores`")
    bits = material.chosen.policy.layers if material.chosen else {}
    blocks: list[Block] = []
    for name, table in material.inputs.scores.items():
        frames = "; frames: the chosen bits" if bits else ""
        caption = f"{name}: score of each pair of weight/activation bits in each layer ({table.method}){frames}"
        caption += "; shown is how far a score lies above the best of its layer" if (table.values < 0).any() else ""
        blocks.append(Figure(caption=caption, pictures=[score_map(f"Scores of {name}", table, bits)]))
        rows = [[layer, *(_score(value) for value in row)] for layer, row in zip(table.layers, table.values.tolist(), strict=True)]
        columns = ["layer", *map(str, table.candidates)]
        blocks.append(Table(caption=f"Scores of {name} as a table", columns=columns, rows=rows, is_folded=True))
    return Section(anchor="sensitivity", title=title, blocks=blocks)


def _least(material: Material, shown: Shown, bits: dict[str, LayerBits]) -> dict[str, LayerBits]:
    """Layer -> the least bits that images may give it, for a dynamic network."""
    run = next((run for name, run in material.inputs.runs.items() if name in shown.names and run.dynamic is not None), None)
    if run is None or run.dynamic is None:
        return {}
    names = list(bits)
    static = run.dynamic.static if run.dynamic.static is not None else (names[0], names[-1])
    low = run.dynamic.low
    return {name: LayerBits(low if run.dynamic.weights else own.weight, low) for name, own in bits.items() if name not in static}


def _own_scores(material: Material) -> ScoreTable | None:
    """The scores by which the chosen policy was found, else the first."""
    tables = material.inputs.scores.values()
    method = material.chosen.policy.provenance.get("method") if material.chosen else None
    return next((table for table in tables if table.method == method), next(iter(tables), None))


def _front_caption(front: ComparedFront) -> str:
    return f"Total score over {cost_name(front.kind)}; lower is better. Scores are predictions of {front.method}, not accuracy."


def _front_legend(front: ComparedFront) -> list[tuple[str, str]]:
    legend = [("s0 curve", "best policy at each cost"), ("s1 mark", "uniform, weight/activation bits")]
    return [*legend, *([("s2 mark", f"{len(front.random)} random policies within the budget: median and range")] if front.random else [])]


def _front_words(front: ComparedFront) -> str:
    if front.chosen is None:
        return "No policy is marked: none was given, or the scores do not cover its bits."
    said = f"The chosen policy scores {front.chosen.score:.4g}"
    if front.random:
        scores = [point.score for point in front.random]
        spread = f"{front.median:.4g} in the median ({min(scores):.4g} to {max(scores):.4g})"
        said += f"; {len(scores)} random policies within the same budget score {spread}"
    else:
        said += "; no random policies beside it, for none was found within 5 % below the budget" if front.caps else "; it tells no budget"
    if front.uniform and front.caps:
        within = [point for point in front.uniform if point.fits]
        best = min(within, key=lambda point: point.score, default=None)
        said += f"; the best uniform one within it, {best.name}, scores {best.score:.4g}" if best else "; no uniform one is within it"
    return said + "."


def _point_row(front: ComparedFront, name: str, point: Point) -> list[str]:
    return [name, cost_text(front.kind, point.cost), f"{point.score:.4g}"]


def _score(value: float) -> str:
    return "forbidden" if math.isinf(value) else f"{value:.3g}"
