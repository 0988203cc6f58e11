"""Tables of policies: bits and costs per layer, totals beside 8 bit and beside the budget."""

from typing import TYPE_CHECKING

import click

from bitscape.cli.output import amount, cost_text, print_table
from bitscape.policy import Policy

if TYPE_CHECKING:
    from bitscape.cost.budget import Budget
    from bitscape.cost.layers import NetworkProfile
    from bitscape.cost.targets import Target
    from bitscape.searches.choices import Choices
    from bitscape.searches.gain import Gain
    from bitscape.searches.scores import ScoreTable


SHOWN = 8
"""Names in a line."""


def print_bits(policy: Policy) -> None:
    """Print the bits of each layer."""
    rows = [[name, str(bits.weight), str(bits.activation)] for name, bits in policy.layers.items()]
    print_table(["layer", "weight bits", "activation bits"], rows)


def print_layers(policy: Policy, network: "NetworkProfile") -> None:
    """Print bits, work, storage and, if it was measured, time of each layer, in call order; the last columns are at the policy's bits."""
    from bitscape.cost.policy_cost import layer_cost

    rows = []
    times = {each.name: layer_cost("latency_ms", each, policy.layers[each.name]) for each in network.layers if network.has_latency}
    for layer in network.layers:
        bits = policy.layers[layer.name]
        work = amount(layer_cost("bitops", layer, bits))
        stored = amount(layer_cost("weight_bytes", layer, bits), "B")
        counts = [amount(layer.weights), amount(layer.macs), str(bits.weight), str(bits.activation)]
        time = [f"{times[layer.name] / 1e6:.4g}", f"{100 * times[layer.name] / max(1, sum(times.values())):.1f} %"] if times else []
        rows.append([layer.name, layer.kind, *counts, work, stored, *time])
    columns = ["layer", "kind", "weights", "MACs", "weight bits", "activation bits", "BitOps", "bytes"]
    columns += ["ms", "of all"] if times else []
    print_table(columns, rows, left=2)


def print_pins(choices: "Choices") -> None:
    """Print what was fixed before the search."""
    fixed: dict[str, list[str]] = {}
    for name, bits in choices.freedom.described().items():
        fixed.setdefault(bits.replace("*/", "weights free, activations "), []).append(name)
    texts = [f"{_listed(names)} ({bits})" for bits, names in fixed.items()]
    click.echo(f"\npinned: {'; '.join(texts) or 'no layer'}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def print_storage(policy: Policy, network: "NetworkProfile", target: "Target | None") -> None:
    """Print what the bits do on the target's target; without one, what weights take in files that store them wider than packed ones."""
    from bitscape.cost.targets import FILES, container_bytes

    if target is not None:
        click.echo(f"\n{target.note(policy)}")
    elif stored := container_bytes(network, policy):
        counts = " and ".join(f"{amount(count, 'B')} in {kind} files" for kind, count in stored.items())
        names = " or ".join(f"--target {FILES[kind]}" for kind in stored)
        click.echo(f"\nweight_bytes are those of packed files; these weights take {counts}: to count those bytes, add {names}")


def print_within_budget(policy: Policy, network: "NetworkProfile", budget: "Budget | None" = None) -> None:
    """Print what a policy costs beside 8 bits everywhere, and beside the caps it was found under."""
    from bitscape.cli.network import uniform_cost
    from bitscape.cost.policy_cost import policy_cost

    own, eight = policy_cost(network, policy), uniform_cost(network, 8)
    caps = {} if budget is None else budget.caps
    rows = []
    for kind, value in own.items():
        beside = [cost_text(kind, value), cost_text(kind, eight[kind]), f"{100 * value / eight[kind]:.1f} %"]
        cap = [cost_text(kind, caps[kind]), f"{100 * value / caps[kind]:.1f} %"] if kind in caps else ["", ""]
        rows.append([kind, *beside, *(cap if caps else [])])
    columns = ["cost of one image", "policy", "8 bit", "of 8 bit", *(["budget", "used"] if caps else [])]
    print_table(columns, rows)
    if gap := policy.provenance.get("gap"):
        from bitscape.searches.allocation import gap_note

        click.echo(f"\nthe allocation ran out of time: {gap_note(gap)}")


def print_loose_caps(policy: Policy, choices: "Choices") -> None:
    """Name the caps that even the widest bits on offer keep, and how many layers have these bits; print nothing where every cap binds."""
    from bitscape.cost.policy_cost import policy_cost

    widest = choices.widest()
    most = policy_cost(choices.network, Policy({**policy.layers, **widest}))
    loose = [kind for kind, limit in choices.budget.caps.items() if most[kind] <= limit]
    if not loose or not widest:
        return
    at_widest = sum(policy.layers[name] == bits for name, bits in widest.items())
    most_bits = ", ".join(map(str, dict.fromkeys(widest.values())))
    click.echo(f"\nnot binding: {', '.join(loose)}; the widest bits, {most_bits} in every free layer, stay within", nl=False)
    if len(loose) < len(choices.budget.caps):
        click.echo()
    else:
        why = "" if at_widest == len(widest) else "; the others score no better with more bits"
        click.echo(f" every cap: {at_widest} of {len(widest)} free layers have them{why}")


def gain_text(gain: "Gain | None") -> str:
    """Say what mixed bits can win."""
    return "expected gain: not told by these scores; those of fisher, kl and hawq do" if gain is None else f"expected gain: {gain}"


def repairs_text(scores: "ScoreTable") -> str:
    """Say how many scores were repaired."""
    count = scores.values.size
    hint = "; many repairs mean too few images" if 10 * scores.repairs > count else ""
    return f"{scores.repairs} of {count} scores repaired to fall with more bits{hint}"
