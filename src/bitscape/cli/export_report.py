"""What `bitscape export` prints of a file: its bytes, its containers, and how a runtime's results agree with exact integers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.export_source import ExportSource
from bitscape.cli.network import network_shapes
from bitscape.cli.output import amount, print_table, size_ratio
from bitscape.cost.targets import TARGETS
from bitscape.policy import Policy

if TYPE_CHECKING:
    from bitscape.exporters.agreement import Agreement
    from bitscape.exporters.integer.form import IntegerNetwork
    from bitscape.exporters.packed.file import PackedInfo
    from bitscape.exporters.parity import ParityReport
    from bitscape.runtimes.sessions import Session



def report_packed(source: ExportSource, info: "PackedInfo", path: Path) -> None:
    """Print the bytes of a packed file."""
    parts = {
        "weights and scales, in the file": info.weight_bytes,
        "  of it scales": 4 * sum(shape[0] for shape in network_shapes(source.float_network).values()),
        "biases, norms, activation scales": info.other_bytes,
        "header": info.file_bytes - info.weight_bytes - info.other_bytes,
    }
    _print_bytes(source, parts, info.file_bytes, path)


def report_file(source: ExportSource, network: "IntegerNetwork", container_bytes: int, file_bytes: int, path: Path) -> None:
    """Print the bytes of a runtime's file, and what was added to the network."""
    from bitscape.exporters.integer.containers import scale_bytes

    parts = {
        "weights, scales and biases, in the file": container_bytes,
        "  of it scales and biases": scale_bytes(network),
        "graph": file_bytes - container_bytes,
    }
    _print_bytes(source, parts, file_bytes, path)
    click.echo(f"{len(network.added)} tensors between layers got 8 bits, which the policy does not count")


def _print_bytes(source: ExportSource, parts: Mapping[str, int], file_bytes: int, path: Path) -> None:
    """Print what a file is made of, beside what the policy's bits say and beside float32."""
    shapes = network_shapes(source.float_network)
    weights = sum(source.policy.layers[name].weight * math.prod(shape) for name, shape in shapes.items()) // 8
    values = sum(tensor.nbytes for tensor in source.float_network.state_dict().values())
    rows = {"weights, as the policy's bits": weights, **parts, "file": file_bytes, "float32 tensors": values}
    print_table(["bytes", ""], [[name, f"{count:,}"] for name, count in rows.items()])
    click.echo(f"{path}: {amount(file_bytes, 'B')}, {size_ratio(values / file_bytes)} than float32")


def report_containers(containers: dict[str, int], policy: Policy, target: str) -> None:
    """Print how the weights are really stored, which layers are not integers, and what the bits do on the target."""
    widths = sorted(set(containers.values()))
    counts = (f"{sum(bits == width for bits in containers.values())} in {width} bits" for width in widths)
    click.echo(f"weights of {len(containers)} of {len(policy.layers)} layers are stored as integers: {', '.join(counts)}")
    if floats := [name for name in policy.layers if name not in containers]:
        click.echo(f"in float: {', '.join(floats)}")
    click.echo(TARGETS[target].note(policy))


def report_parity(report: "ParityReport", allowed: float) -> None:
    """Print how many codes differ. Raises BitscapeError if more than the share `allowed` of a layer does."""
    differing = f"{report.differing_codes} of {amount(report.codes)} codes differ from exact integers"
    click.echo(f"{report.runtime}: {len(report.layers)} layers, {differing}")
    if report.float_outputs:
        click.echo(f"computed in float, for outputs stay float and it has no integer kernel for these: {', '.join(report.float_outputs)}")
    report.require(allowed)


def report_agreement(source: ExportSource, network: "IntegerNetwork", session: "Session", runtime: str) -> None:
    """Print how far the runtime's outputs agree with exact integers, and with the network as it was simulated, and on which images.

    Raises:
        BitscapeError: an output is further from exact integers than roundings of additions explain.
    """
    from bitscape.exporters.agreement import compare_outputs, require_same

    exact, simulated = compare_outputs(network, source.network, session, source.compared_images)
    _print_agreement({"exact integers": exact, "before the export": simulated})
    click.echo(f"{runtime}, compared on {source.compared_on}")
    require_same(exact, runtime)


def _print_agreement(results: "Mapping[str, Mapping[str, Agreement]]") -> None:
    """Print, for each output, a row for each of the networks that it is compared with."""
    from bitscape.exporters.agreement import percent

    names = next(iter(results.values()))
    rows = [
        [name, other, f"{100 * found.difference:.2g} %", percent(found.same_class), percent(found.identical)]
        for name in names
        for other, found in ((other, agreements[name]) for other, agreements in results.items())
    ]
    print_table(["output", "compared with", "off", "same class", "equal bits"], rows, left=2)
