"""`bitscape solve`: from saved scores to the policy of any budget, or to a Pareto front, without scoring again."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.latency import load_target
from bitscape.cli.network import load_network, measure_network
from bitscape.cli.options import (
    caps_option,
    keep_float_option,
    latency_option,
    model_option,
    pin_option,
    policy_out_option,
    shape_option,
    target_option,
)
from bitscape.cli.output import amount, print_table
from bitscape.cli.parsing import parse_pins, parse_shape
from bitscape.cli.paths import FILE
from bitscape.cli.tables import gain_text, print_layers, print_loose_caps, print_pins, print_storage, print_within_budget
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy

if TYPE_CHECKING:
    from bitscape.cost.layers import NetworkProfile
    from bitscape.searches.choices import Choices
    from bitscape.searches.freedom import Pins
    from bitscape.searches.scores import ScoreTable

MOST_POINTS = 1000
"""Of a front: each is a problem of its own to solve."""


@click.command()
@click.option("--scores", required=True, type=FILE, metavar="FILE", help="What `bitscape search --scores` wrote.")
@model_option
@shape_option
@caps_option
@click.option("--front", type=click.IntRange(2, MOST_POINTS), metavar="N", help="Instead of --budget: up to N best policies by cost.")
@click.option("--along", default="bitops", show_default=True, metavar="KIND", help="Cost of the front.")
@latency_option
@target_option
@pin_option
@keep_float_option
@policy_out_option
def solve(
    scores: Path,
    model: str,
    input_shape: str | None,
    budgets: tuple[str, ...],
    front: int | None,
    along: str,
    latency: Path | None,
    target_name: str | None,
    pins: tuple[str, ...],
    keep_float: tuple[str, ...],
    out: Path | None,
) -> None:
    """Find the bits for another budget from saved scores.

    Nothing is scored again: it takes a second. Pin the layers that were pinned in the search.

    \b
    Example:
      bitscape solve --scores scores.json --model timm:resnet18 \\
        --input-shape 3x224x224 --budget bitops=w4a4 --out w4a4.json
      bitscape solve --scores scores.json --model timm:resnet18 \\
        --input-shape 3x224x224 --front 10
    """
    from bitscape.cost.budget import Budget, check_form
    from bitscape.cost.policy_cost import NO_TABLE, cap
    from bitscape.searches.choices import Choices
    from bitscape.searches.scores import ScoreTable

    shape = parse_shape(input_shape)
    if shape is None:
        raise BitscapeError("--input-shape is missing; write the shape of one image, e.g. --input-shape 3x224x224")
    if bool(budgets) == (front is not None):
        raise BitscapeError("give --budget for one policy, or --front N for many; exactly one of the two")
    if front is not None and out is not None:
        raise BitscapeError("--out: a front is many policies; solve with --budget for the one to keep")
    if budgets:
        check_form(budgets, has_latency=latency is not None)
    elif cap(along).measured and latency is None:
        raise BitscapeError(f"--along {along}: {NO_TABLE}")
    pinned = parse_pins(pins)
    table, (times, target) = ScoreTable.load(scores), load_target(latency, target_name)
    candidates = [pair for pair in table.candidates if target is None or target.allows(pair)]
    if target is not None and not candidates:
        target.check("--scores", table.candidates)
    network = measure_network(load_network(model, None, "cpu"), shape)
    choices = Choices.of(
        network,
        budgets or Budget(),
        candidates=candidates,
        pinned=_without_scores(pinned, table, network),
        keep_float=keep_float,
        latency=times,
        target=target,
        along=along if front is not None else None,
    )
    if front is not None:
        _print_front(table, choices, along, front)
    else:
        source: dict[str, object] = {"model": model, "images": [1, *shape], "scores": str(scores)}
        _solve(table, choices, source, out)


def _without_scores(pins: "Pins", table: "ScoreTable", network: "NetworkProfile") -> "Pins":
    """Pin those ends at 8/8 that the search did not score, as it does under caps on activations."""
    unscored = [name for name in network.ends if name not in table.layers] if pins.ends else []
    return replace(pins, layers={**dict.fromkeys(unscored, LayerBits.EIGHT), **pins.layers})


def _solve(table: "ScoreTable", choices: "Choices", source: dict[str, object], out: Path | None) -> None:
    from bitscape.searches.allocation import allocate
    from bitscape.searches.gain import gain_of

    policy = allocate(table, choices)
    policy = replace(policy, provenance={**policy.provenance, **choices.provenance(), **source})
    if out is not None:  # first: whatever becomes of the output, the work is kept
        policy.save(out)
    print_layers(policy, choices.network)
    click.echo()
    print_within_budget(policy, choices.network, choices.budget)
    print_pins(choices)
    print_loose_caps(policy, choices)
    print_storage(policy, choices.network, choices.target)
    click.echo(f"\n{gain_text(gain_of(table, choices))}")
    click.echo("\nthe policy is not kept; --out FILE keeps it" if out is None else f"\npolicy: {out}")


def _print_front(table: "ScoreTable", choices: "Choices", along: str, points: int) -> None:
    from bitscape.searches.allocation import pareto_front

    policies = pareto_front(table, choices, along, points).policies
    columns = [f"{along}=", "weight_bytes", "mean weight bits", "mean activation bits", f"score ({table.method})"]
    print_table(columns, [_front_row(policy, along) for policy in policies], left=0)
    click.echo(f"\none of them: bitscape solve ... --budget {along}={policies[-1].cost[along]!r}")


def _front_row(policy: Policy, along: str) -> list[str]:
    cost = policy.cost
    means = [f"{cost[kind]:.3f}" for kind in ("mean_weight_bits", "mean_activation_bits")]
    # The exact cost, so that it can be copied into a budget.
    return [repr(cost[along]), amount(cost["weight_bytes"], "B"), *means, f"{policy.provenance['score']:.4g}"]
