"""`bitscape policy`: show, compare, check and convert policy files.

Torch is imported only where a network is named, or a policy converted.
"""

from pathlib import Path
from typing import Any

import click

from bitscape.cli.convert import tool_options, write_converted
from bitscape.cli.network import load_latency, load_network, measure_network, network_shapes, policy_shape
from bitscape.cli.options import latency_option, model_option, shape_option
from bitscape.cli.output import cost_text, print_costs, print_table, short_names
from bitscape.cli.parsing import parse_shape
from bitscape.cli.paths import FILE, MODEL
from bitscape.cli.tables import print_bits, print_layers, print_within_budget
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy


@click.group(invoke_without_command=True)
@click.pass_context
def policy(context: click.Context) -> None:
    """Show, compare, check and convert policy files."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@policy.command()
@click.argument("file", type=FILE)
@click.option("--model", type=MODEL, metavar="NAME", help="Network, for costs per layer: package.module:function, timm:name, ...")
@shape_option
@latency_option
def show(file: Path, model: str | None, input_shape: str | None, latency: Path | None) -> None:
    """Show the bits of each layer, and where the policy comes from.

    \b
    Example:
      bitscape policy show policy.json
      bitscape policy show policy.json --model timm:resnet18 --input-shape 3x224x224
    """
    if latency is not None and model is None:
        raise BitscapeError("--latency needs --model: the network whose layers take these times")
    shown = Policy.load(file)
    if model is None:
        print_bits(shown)
    else:
        _print_costs(shown, model, parse_shape(input_shape), latency)
    if model is None and shown.cost:
        click.echo()
        print_costs({"as saved": shown.cost})
    if shown.provenance:
        click.echo()
        found = [[name, _word(value)] for name, value in shown.provenance.items() if value is not None]
        print_table(["provenance", ""], found, left=2)


@policy.command()
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
def diff(first: Path, second: Path) -> None:
    """List the layers in which two policies differ, and their costs.

    \b
    Example:
      bitscape policy diff before.json after.json
    """
    before, after = Policy.load(first), Policy.load(second)
    changes = before.difference(after)
    names = short_names([str(first), str(second)])
    columns = [names[str(first)], names[str(second)]]
    if changes:
        print_table(["layer, weight/activation bits", *columns], [[name, _bits(a), _bits(b)] for name, a, b in changes])
    click.echo(f"{len(changes)} of {len(before.layers.keys() | after.layers.keys())} layers differ")
    if before.cost and after.cost:
        click.echo()
        rows = [[kind, *(_cost(p, kind) for p in (before, after))] for kind in dict.fromkeys([*before.cost, *after.cost])]
        print_table(["cost, as saved", *columns], rows)


@policy.command()
@click.argument("file", type=FILE)
@model_option
def check(file: Path, model: str) -> None:
    """Check that a policy covers a network: names, weight shapes, bits.

    \b
    Example:
      bitscape policy check policy.json --model timm:resnet18
    """
    checked = Policy.load(file)
    checked.check(network_shapes(load_network(model, None, "cpu")))
    mark = "names and shapes agree" if checked.fingerprint else "names agree; the policy has no fingerprint"
    click.echo(f"fits {model}: {len(checked.layers)} layers, {mark}")


@policy.command()
@click.argument("file", type=FILE)
@tool_options
def convert(file: Path, tool: str, out: Path, **options: Any) -> None:
    """Write a policy as another tool takes it.

    The bits alone are handed on: each tool rounds the float network by itself. docs/adapters.md says how each file is used.

    \b
    Example:
      bitscape policy convert policy.json --to executorch-arm --out arm.json
      bitscape policy convert policy.json --to torchao --model timm:vit_tiny_patch16_224 \\
        --rounding up --out torchao.json
      bitscape policy convert policy.json --to model-explorer --model timm:resnet18 \\
        --input-shape 3x224x224 --program network.pt2 --out bits.json
      bitscape policy convert policy.json --to hailo --names names.json --out network.alls
    """
    converted = Policy.load(file)
    write_converted(converted, tool, out, **options)
    click.echo(f"{out}: {len(converted.layers)} layers for {tool}")


def _print_costs(shown: Policy, model: str, given: tuple[int, int, int] | None, latency: Path | None) -> None:
    from bitscape.cost.latency import with_latency

    shape, times = policy_shape(shown, given), load_latency(latency)
    loaded = load_network(model, None, "cpu")
    shown.check(network_shapes(loaded))
    network = measure_network(loaded, shape)
    network = network if times is None else with_latency(network, times)
    print_layers(shown, network)
    click.echo()
    print_within_budget(shown, network)
    if times is not None:
        click.echo(f"latency_ms: {times.where}")


def _bits(bits: LayerBits | None) -> str:
    return "-" if bits is None else str(bits)


def _cost(shown: Policy, kind: str) -> str:
    return cost_text(kind, shown.cost.get(kind))


def _word(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={inner}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
