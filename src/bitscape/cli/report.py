"""`bitscape report`: what searches, runs and measurements left, as one HTML page."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.network import load_network, measure_network, policy_shape
from bitscape.cli.options import shape_option
from bitscape.cli.parsing import parse_shape
from bitscape.cli.paths import FILE, FILE_OR_FOLDER, MODEL, OutputFile
from bitscape.errors import BitscapeError
from bitscape.files import write_atomic
from bitscape.policy import Policy

if TYPE_CHECKING:
    from bitscape.cost.layers import NetworkProfile
    from bitscape.report.inputs import Inputs


@click.command()
@click.argument("runs", nargs=-1, required=True, type=FILE_OR_FOLDER, metavar="RUN...")
@click.option("--model", type=MODEL, metavar="NAME", help="Network, for costs per layer: package.module:function, timm:name, ...")
@click.option("--weights", type=FILE, metavar="FILE", help="Its float weights, to check that they fit; costs do not depend on them.")
@shape_option
@click.option("--out", required=True, type=OutputFile(".html"), metavar="FILE", help="Where the page goes, .html.")
def report(runs: tuple[Path, ...], model: str | None, weights: Path | None, input_shape: str | None, out: Path) -> None:
    """Make one HTML page of what was searched, trained and measured.

    RUN is any mix of folders of `train` and `tiers`, policy and score files, and the .json of `analyze`, `evaluate`, `bench` and
    `latency build`, all of one network. The page is one file that fetches nothing.

    \b
    Example:
      bitscape report policy.json scores.json run1 run2 \\
        --model timm:resnet18 --input-shape 3x224x224 --out report.html
    """
    from bitscape.report.inputs import read_inputs
    from bitscape.report.page import report_page

    if model is None and (weights is not None or input_shape is not None):
        raise BitscapeError("--weights and --input-shape are about a network; add --model NAME")
    inputs = read_inputs(runs)
    network = None if model is None else _network(inputs, model, weights, input_shape)
    page = report_page(inputs, network=network, model=model, command=_command(runs, model, weights, input_shape, out))
    write_atomic(out, page)
    click.echo(f"report: {out}, {len(page.encode()) / 1000:.0f} kB")


def _network(inputs: "Inputs", model: str, weights: Path | None, input_shape: str | None) -> "NetworkProfile":
    told = (policy for policy in inputs.policies.values() if "images" in policy.provenance)
    shape = policy_shape(next(told, Policy({})), parse_shape(input_shape))
    return measure_network(load_network(model, weights, "cpu"), shape)


def _command(runs: tuple[Path, ...], model: str | None, weights: Path | None, input_shape: str | None, out: Path) -> str:
    options = {"--model": model, "--weights": weights, "--input-shape": input_shape, "--out": out}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["bitscape", "report", *map(str, runs), *given])
