"""Section 1: what was asked and what came out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bitscape.dynamic.storage import TiersDocument
from bitscape.policy import Policy
from bitscape.report.blocks import Block, Missing, Section, Table, Text
from bitscape.report.documents import EvaluationDocument
from bitscape.report.inputs import TrainedRun
from bitscape.report.material import Material
from bitscape.report.measured import by_data
from bitscape.report.policies import Shown, caps_of, group_of
from bitscape.words import NONE, amount, cost_name, cost_text, counted, listed, percent, points

GIVE_POLICY = "Needs a policy file of `bitscape search`, or a folder of `bitscape train --policy`"


def asked(material: Material) -> Section | Missing:
    """Section 1: the question, the chosen policy and its cost, accuracy."""
    title = "What was asked and what came out"
    if material.chosen is None and not material.inputs.runs and not material.inputs.evaluations:
        return Missing(title=title, reason=GIVE_POLICY)
    words = _measured_words(material)
    blocks: list[Block] = [Text(words)] if words else []
    if material.chosen is not None:
        blocks += [*_question(material.chosen.policy), _cost_table(material, material.chosen)]
    if len(material.policies) > 1:
        blocks.append(_policy_table(material))
    blocks += [_evaluations(data, documents) for data, documents in by_data(material).items()]
    blocks += [_tiers_table(name, tiers) for name, tiers in material.inputs.tiers.items()]
    if material.inputs.runs:
        blocks.append(_accuracy(material))
    return Section(anchor="result", title=title, blocks=blocks)


def _measured_words(material: Material) -> str:
    """What was measured, in a few sentences; "" for nothing."""
    said = [_in_words(data, documents) for data, documents in by_data(material).items()]
    means = [
        f"{group.mean:.2f} % {group.method} ({counted(len(group.top1), 'seed')})"
        for group in material.groups
    ]
    said += [f"Top-1 after training: {listed(means)}."] if means else []
    return " ".join(said)


def _in_words(pair: tuple[str, str], documents: list[EvaluationDocument]) -> str:
    data, metric = pair
    values = listed(f"{document.value:.4g} {document.evaluated}" for document in documents)
    return f"Measured on {data}, {metric}: {values}."


def _evaluations(pair: tuple[str, str], documents: list[EvaluationDocument]) -> Table:
    data, metric = pair
    others = list(dict.fromkeys(name for document in documents for name in document.others))
    first = documents[0]
    rows = [
        [
            document.evaluated,
            f"{document.value:.4g}",
            NONE if document is first else f"{document.value - first.value:+.4g}",
            *(
                f"{document.others[name]:.4g}" if name in document.others else NONE
                for name in others
            ),
            cost_text(
                "weight_bytes",
                document.cost.get("weight_bytes", document.cost.get("parameter_bytes")),
            ),
            cost_text("bitops", document.cost.get("bitops")),
            str(document.samples),
        ]
        for document in documents
    ]
    columns = [
        "network",
        metric,
        f"beside {first.evaluated}",
        *others,
        "weight bytes",
        "BitOps",
        "samples",
    ]
    return _without_empty(Table(caption=f"Measured on {data}", columns=columns, rows=rows))


def _question(policy: Policy) -> list[Table]:
    found = policy.provenance
    facts = {
        "network": found.get("model"),
        "weights": found.get("weights"),
        "budget": " and ".join(
            f"{cost_name(kind)} ≤ {cost_text(kind, value)}"
            for kind, value in caps_of(policy).items()
        )
        or None,
        "method": found.get("method"),
        "settings": _settings(found),
        "images": _images(found),
        "to be trained afterwards": None
        if "for_training" not in found
        else "yes"
        if found["for_training"] is True
        else "no",
        "seed of the search": found.get("seed"),
        "target": found.get("target"),
        "fingerprint": policy.fingerprint,
    }
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    return (
        [
            Table(
                caption="What was asked",
                columns=["what", "as the policy file tells"],
                rows=rows,
                left=2,
            )
        ]
        if rows
        else []
    )


def _settings(found: Mapping[str, Any]) -> str | None:
    settings = found.get("settings")
    return (
        ", ".join(f"{name} {value}" for name, value in settings.items())
        if isinstance(settings, Mapping)
        else None
    )


def _images(found: Mapping[str, Any]) -> str | None:
    images, source = found.get("images"), f" from {found['data']}" if "data" in found else ""
    return (
        f"{images[0]} of {'x'.join(map(str, images[1:]))}{source}"
        if isinstance(images, list) and len(images) == 4
        else None
    )


def _cost_table(material: Material, shown: Shown) -> Table:
    own, eight, caps = material.costs(shown.policy), material.eight_bits, material.caps
    rows = [
        [
            *(
                cost_name(kind),
                cost_text(kind, value),
                cost_text(kind, eight.get(kind)),
                percent(value, eight.get(kind)),
            ),
            *(cost_text(kind, caps.get(kind)), percent(value, caps.get(kind))),
        ]
        for kind, value in own.items()
    ]
    columns = ["cost of one image", "chosen policy", "8 bit", "of 8 bit", "cap", "of the cap"]
    how = "counted on the network" if material.network else "as saved in the policy"
    how += (
        "; with every layer at its largest width, which images do not reach"
        if shown.is_widest
        else ""
    )
    return _without_empty(Table(caption=f"Cost, {how}", columns=columns, rows=rows))


def _policy_table(material: Material) -> Table:
    kinds = ("mean_weight_bits", "mean_activation_bits", "bitops", "weight_bytes")
    rows = []
    for each in material.policies:
        mark = " (chosen)" if each is material.chosen else ""
        rows.append(
            [listed(each.names) + mark, each.method, *material.cost_words(each.policy, *kinds)]
        )
    return Table(
        caption="All policies",
        columns=["policy", "method", *map(cost_name, kinds)],
        rows=rows,
        left=2,
    )


def _accuracy(material: Material) -> Table:
    rows = [_run_row(name, run) for name, run in material.inputs.runs.items()]
    columns = [
        "run",
        "bits",
        "seed",
        "epochs",
        "training, %",
        "validation, %",
        "bits of images",
        "BitOps of images",
        "asked for",
    ]
    return _without_empty(
        Table(caption="Top-1 after the last epoch", columns=columns, rows=rows, left=2)
    )


def _run_row(name: str, run: TrainedRun) -> list[str]:
    last = run.records[-1] if run.records else {}
    done, planned = last.get("epoch", 0), run.settings.get("epochs")
    epochs = f"{done:g}" if run.ended else f"{done:g} of {planned}, not ended"
    spent = [
        cost_text(kind, value)
        for kind, value in (
            ("mean_activation_bits", last.get("bits")),
            ("bitops", last.get("bitops")),
        )
    ]
    spent.append(cost_text("bitops", run.bitops_cap))
    return [
        name,
        group_of(run),
        NONE if run.seed is None else str(run.seed),
        epochs,
        points(last.get("top1")),
        points(run.top1),
        *spent,
    ]


def _without_empty(table: Table) -> Table:
    """The table without columns that hold nothing."""
    kept = [
        at
        for at in range(len(table.columns))
        if any(row[at] != NONE for row in table.rows) or at < table.left
    ]
    return replace(
        table,
        columns=[table.columns[at] for at in kept],
        rows=[[row[at] for at in kept] for row in table.rows],
    )


def _tiers_table(name: str, tiers: TiersDocument) -> Table:
    rows = [
        [
            f"tier{at}",
            f"{own.mean_weight_bits:.4g}",
            f"{own.mean_activation_bits:.4g}",
            amount(own.bitops),
            f"{100 * own.share:.1f} %",
        ]
        for at, own in enumerate(tiers.tiers, start=1)
    ]
    columns = ["tier", "mean weight bits", "mean activation bits", "BitOps", "of the images"]
    return Table(
        caption=f"Tiers of {name}; the gate takes {amount(tiers.gate_bitops)} BitOps",
        columns=columns,
        rows=rows,
    )
