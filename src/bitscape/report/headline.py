"""The first screen: what became smaller and faster, what that cost, and a plot of both."""

from bitscape.report.blocks import Change, Figure, Headline
from bitscape.report.documents import BenchRow
from bitscape.report.front import ComparedFront
from bitscape.report.material import Material
from bitscape.report.measured import (
    CHOSEN,
    FLOAT,
    OTHER,
    RANDOM,
    UNIFORM,
    Measurement,
    Measurements,
    measured,
)
from bitscape.report.policies import Shown
from bitscape.report.policy_charts import front_chart, measured_chart
from bitscape.words import cost_name, cost_text, counted, listed, percent

NOT_MEASURED = "The metric was not measured; add the .json of bitscape evaluate --json."
FLOAT_BYTES = 4
"""Of a float weight."""


def headline(material: Material) -> Headline:
    """Sum up the report: sentences, numbers before and after, and one plot."""
    measurements = measured(material)
    changes = (
        _metric(measurements),
        _size(material, measurements),
        _time(material) or _cost(material),
    )
    words = [] if material.chosen is None else _of_policy(material, material.chosen)
    words += [NOT_MEASURED] if words and measurements is None else []
    return Headline(
        words=" ".join(words),
        changes=[change for change in changes if change is not None],
        figure=_figure(material, measurements),
    )


def _of_policy(material: Material, shown: Shown) -> list[str]:
    layers = counted(len(shown.policy.layers), "layer")
    if shown.is_widest:
        return [f"{shown.name} has {layers}, and images decide on their bits ({shown.method})."]
    weights = [bits.weight for bits in shown.policy.layers.values()]
    same = len(set(weights)) == 1
    widths = str(weights[0]) if same else f"{min(weights)} to {max(weights)}"
    sentences = [f"{shown.name} ({shown.method}) gives {layers} weights of {widths} bits."]
    costs, caps = material.costs(shown.policy), material.caps
    used = [
        f"{percent(costs[kind], cap)} of the {cost_name(kind)} allowed"
        for kind, cap in caps.items()
        if kind in costs
    ]
    return [*sentences, f"It uses {listed(used)}."] if used else sentences


def _metric(measurements: Measurements | None) -> Change | None:
    """The metric in float and quantized, with its interval, and that of the controls."""
    if measurements is None:
        return None
    subject, notes = _subject(measurements), []
    if subject.interval is not None:
        notes.append(f"95 % interval {' to '.join(map(measurements.text, subject.interval))}")
    if uniform := _beside(subject, measurements.of(UNIFORM)):
        notes.append(f"{uniform.name}: {measurements.text(uniform.value)}")
    if drawn := measurements.of(RANDOM):
        mean = sum(one.value for one in drawn) / len(drawn)
        notes.append(
            f"random: {measurements.text(mean)}" + (f" (mean of {len(drawn)})" if drawn[1:] else "")
        )
    in_float = measurements.of(FLOAT)
    return Change(
        name=f"{measurements.metric}, {measurements.where}",
        before=measurements.text(in_float[0].value) if in_float else "",
        after=measurements.text(subject.value),
        note="; ".join(notes),
    )


def _subject(measurements: Measurements) -> Measurement:
    """The chosen network, else the first that is no control, else the first quantized one."""
    quantized = [one for one in measurements.all if one.role != FLOAT]
    return min(quantized, key=lambda one: (CHOSEN, OTHER, UNIFORM, RANDOM).index(one.role))


def _beside(subject: Measurement, uniform: tuple[Measurement, ...]) -> Measurement | None:
    """The uniform network of the closest size."""

    def distance(one: Measurement) -> float:
        return abs((one.bytes or 0) - (subject.bytes or 0))

    return min((one for one in uniform if one is not subject), key=distance, default=None)


def _size(material: Material, measurements: Measurements | None) -> Change | None:
    """Bytes of the weights."""
    costs = material.costs(material.chosen.policy) if material.chosen else {}
    after = costs.get(
        "weight_bytes", None if measurements is None else _subject(measurements).bytes
    )
    if after is None:
        return None
    before: float | None = None
    if material.network is not None:
        layers = (*material.network.layers, *material.network.never_called)
        before = FLOAT_BYTES * sum(layer.weights for layer in layers)
    elif measurements is not None and measurements.of(FLOAT):
        before = measurements.of(FLOAT)[0].bytes
    return Change(
        name="size of the weights",
        before="" if before is None else cost_text("weight_bytes", before),
        after=cost_text("weight_bytes", after),
        note="" if before is None else f"{before / after:.1f} times smaller",
    )


def _time(material: Material) -> Change | None:
    """Milliseconds of the first file of a bench beside its first row, at the least batch."""
    for bench in material.inputs.benches.values():
        least = min(row.batch_size for row in bench.rows)
        first, *others = (row for row in bench.rows if row.batch_size == least)
        if others:
            return _times(first, others[0], bench.machine, by_wall=bench.threads > 1)
    return None


def _times(first: BenchRow, file: BenchRow, machine: str, *, by_wall: bool) -> Change:
    before, after = (row.wall_ms if by_wall else row.cpu_ms for row in (first, file))
    return Change(
        name=f"ms for a batch of {file.batch_size}",
        before=f"{before:.4g}",
        after=f"{after:.4g}",
        note=f"{before / after:.2f} times faster than {first.file}; {file.file}, {machine}",
    )


def _cost(material: Material) -> Change | None:
    """Milliseconds by a latency table, else BitOps, beside 8 bit."""
    if material.chosen is None:
        return None
    costs, eight = material.costs(material.chosen.policy), material.eight_bits
    kind = next((kind for kind in ("latency_ms", "bitops") if kind in costs), None)
    if kind is None:
        return None
    return Change(
        name=cost_name(kind) + (", beside 8 bit" if kind in eight else ""),
        before=cost_text(kind, eight[kind]) if kind in eight else "",
        after=cost_text(kind, costs[kind]),
        note=f"{percent(costs[kind], eight[kind])} of 8 bit" if kind in eight else "",
    )


def _figure(material: Material, measurements: Measurements | None) -> Figure | None:
    if measurements is not None and measurements.sized:
        caption = f"{measurements.metric} over the size of the weights; {measurements.where}"
        legend = [("s0 mark", "chosen")] if measurements.of(CHOSEN) else []
        legend += [("s1 mark", "uniform bits")] if measurements.of(UNIFORM) else []
        legend += [("s2 mark", "random bits")] if measurements.of(RANDOM) else []
        legend += [("s3 mark", "other bits")] if measurements.of(OTHER) else []
        if any(one.interval for one in measurements.sized):
            caption += "; strokes: 95 % intervals"
        return Figure(caption=caption, pictures=[measured_chart(measurements)], legend=legend)
    if material.front is not None:
        return Figure(
            caption=front_caption(material.front),
            pictures=[front_chart(material.front)],
            legend=front_legend(material.front),
        )
    return None


def front_caption(front: ComparedFront) -> str:
    """What the plot of a front shows."""
    return (
        f"Total score over {cost_name(front.kind)}; lower is better. Scores are predictions of "
        f"{front.method}, not accuracy."
    )


def front_legend(front: ComparedFront) -> list[tuple[str, str]]:
    """Samples of the marks in the plot of a front."""
    legend = [
        ("s0 curve", "best policy at each cost"),
        ("s1 mark", "uniform, weight/activation bits"),
    ]
    if front.random:
        drawn = f"{len(front.random)} random policies within the budget: median and range"
        legend.append(("s2 mark", drawn))
    return legend
