"""The section about every budget: the front of the scores, and the policy at each of its points."""

from collections.abc import Sequence

from markupsafe import Markup

from bitscape.policy import LayerBits
from bitscape.report.blocks import Missing, Section, Slider, Table, Text
from bitscape.report.front import ComparedFront, Point
from bitscape.report.headline import front_caption, front_legend
from bitscape.report.layer_charts import (
    SHADES,
    WIDTHS,
    Cells,
    bits_panels,
    cell_map,
    scale_legend,
    top_bits,
)
from bitscape.report.material import Material
from bitscape.report.policy_charts import front_chart, front_plane
from bitscape.report.policy_sections import GIVE_MODEL
from bitscape.words import cost_name, cost_text


def pareto(material: Material) -> Section | Missing:
    """Section 4."""
    title = "The policy at every budget"
    front = material.front
    if material.scores is None:
        return Missing(title=title, reason="Needs the score file of `bitscape search --scores`")
    if material.network is None:
        return Missing(title=title, reason=GIVE_MODEL)
    if front is None:
        reason = "Needs the latency table, which the budget of the policy caps"
        return Missing(title=title, reason=reason)
    rows = [_point_row(front, "front", point) for point in front.best]
    rows += [_point_row(front, f"uniform {point.name}", point) for point in front.uniform]
    rows += [_point_row(front, point.name, point) for point in front.random]
    rows += [_point_row(front, "chosen", front.chosen)] if front.chosen else []
    columns = ["policy", cost_name(front.kind), "score"]
    numbers = Table(caption="Points as a table", columns=columns, rows=rows, is_folded=True)
    return Section(
        anchor="front",
        title=title,
        blocks=[Text(front_words(front)), _slider(material, front), numbers],
    )


def front_words(front: ComparedFront) -> str:
    """Say how the chosen policy scores beside random and uniform ones."""
    if front.chosen is None:
        return "No policy is marked: none was given, or the scores do not cover its bits."
    words = f"The chosen policy scores {front.chosen.score:.4g}"
    if front.random:
        scores = [point.score for point in front.random]
        spread = f"{front.median:.4g} in the median ({min(scores):.4g} to {max(scores):.4g})"
        words += f"; {len(scores)} random policies within the same budget score {spread}"
    elif front.caps:
        words += "; no random policies beside it, for none was found within 5 % below the budget"
    else:
        words += "; it tells no budget"
    if front.uniform and front.caps:
        within = [point for point in front.uniform if point.fits]
        best = min(within, key=lambda point: point.score, default=None)
        if best:
            words += f"; the best uniform one within it, {best.name}, scores {best.score:.4g}"
        else:
            words += "; no uniform one is within it"
    return words + "."


def _slider(material: Material, front: ComparedFront) -> Slider:
    bits = [material.in_call_order(point.policy) for point in front.best if point.policy]
    start = _start(front)
    plane = front_plane(front)
    every = [pair for policy in bits for pair in policy.values()]
    varied = [kind for kind in WIDTHS if len({getattr(pair, kind) for pair in every}) > 1]
    kinds = varied or WIDTHS
    data = {
        "told": [_in_words(front, point) for point in front.best],
        "x": [round(plane.x(point.cost), 1) for point in front.best],
        "y": [round(plane.y(point.score), 1) for point in front.best],
        **{f"{kind}s": [_widths(policy, kind) for policy in bits] for kind in kinds},
    }
    costs = [cost_text(front.kind, point.cost) for point in front.best]
    return Slider(
        caption=f"{front_caption(front)} Below: the bits at the slider, and at every budget.",
        chart=front_chart(front),
        bits=bits_panels("Bits per layer at the slider", bits[start], kinds, top_bits(every)),
        maps=[_map(kind, bits, costs, start) for kind in kinds],
        legend=front_legend(front),
        start=start,
        data=data,
    )


def _start(front: ComparedFront) -> int:
    """The last point that costs no more than the chosen policy."""
    goal = front.chosen.cost if front.chosen else front.best[-1].cost
    return max((at for at, point in enumerate(front.best) if point.cost <= goal), default=0)


def _in_words(front: ComparedFront, point: Point) -> str:
    """Cost, score and mean bits of a point."""
    costs = point.policy.cost if point.policy else {}
    means = [
        f"{cost_name(kind)} {costs[kind]:.2f}"
        for kind in ("mean_weight_bits", "mean_activation_bits")
        if kind in costs and kind != front.kind
    ]
    cost = f"{cost_name(front.kind)} {cost_text(front.kind, point.cost)}"
    return "\n".join([cost, f"score {point.score:.3g}", *means])


def _widths(bits: dict[str, LayerBits], kind: str) -> list[int]:
    return [getattr(pair, kind) for pair in bits.values()]


def _map(
    kind: str, bits: Sequence[dict[str, LayerBits]], costs: Sequence[str], start: int
) -> Markup:
    """Layers across, budgets down."""
    layers = list(bits[0])
    columns = [[getattr(policy[name], kind) for policy in bits] for name in layers]
    least, most = min(map(min, columns)), max(map(max, columns))
    shades = [[_shade(width, least, most) for width in column] for column in columns]
    cells = Cells(layers=layers, rows=costs, shades=shades, marked=start)
    title = f"{kind} bits at every budget"
    legend = scale_legend(title, str(least), str(most))
    return cell_map(title, f"From {least} to {most} bits.", cells, legend, label="tiny")


def _shade(width: int, least: int, most: int) -> str:
    return f"c{round((width - least) / max(most - least, 1) * (SHADES - 1))}"


def _point_row(front: ComparedFront, name: str, point: Point) -> list[str]:
    return [name, cost_text(front.kind, point.cost), f"{point.score:.4g}"]
