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
from bitscape.errors import BitscapeError
from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from bitscape.exporters.agreement import Agreement, Array
    from bitscape.exporters.integer.form import IntegerNetwork
    from bitscape.exporters.packed.file import PackedInfo
    from bitscape.exporters.parity import ParityReport
    from bitscape.runtimes.sessions import Session

BATCH = 32
LEAST_SAME_CLASS, SMALL_DIFFERENCE, LARGE_DIFFERENCE = 0.8, 0.02, 0.25
"""Outputs that are more than so far off, by their norm, were computed otherwise; less far if fewer images have the class of exact integers:
a large difference costs classes, while a small one changes those that hang by a thread. Roundings of additions differ in OpenVINO."""
PARITY_IMAGES = 16
"""Images whose every code is compared: the reference computes exactly, and slowly."""


def report_packed(source: ExportSource, info: "PackedInfo") -> None:
    """Print the bytes of a packed file."""
    parts = {
        "weights and scales, in the file": info.weight_bytes,
        "  of it scales": 4 * sum(shape[0] for shape in network_shapes(source.float_network).values()),
        "biases, norms, activation scales": info.other_bytes,
        "header": info.file_bytes - info.weight_bytes - info.other_bytes,
    }
    _print_bytes(source, parts, info.file_bytes, info.path)


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
    import torch

    from bitscape.exporters.agreement import Comparison
    from bitscape.exporters.integer.execution import run_integers
    from bitscape.models.named_outputs import named_outputs

    exact, simulated = Comparison(), Comparison()
    for batch in source.compared_images.split(BATCH):
        outputs = dict(zip(session.outputs, session.run(batch.numpy()), strict=True))
        exact.add(len(batch), _arrays(run_integers(network, batch)), outputs)
        with torch.no_grad():
            simulated.add(len(batch), _arrays(named_outputs(source.network(batch))), outputs)
    _print_agreement({"exact integers": exact.result(), "before the export": simulated.result()})
    click.echo(f"{runtime}, compared on {source.compared_on}")
    for name, agreement in exact.result().items():
        if computed_otherwise(agreement):
            raise BitscapeError(
                f"{runtime} computes output {name} otherwise than the file says: {100 * agreement.difference:.2g} % off exact integers, "
                f"and their class on {_percent(agreement.same_class)} of the images; do not use the file with this version, or export for "
                "another runtime"
            )


def _arrays(outputs: "Mapping[str, Tensor]") -> "dict[str, Array]":
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def _print_agreement(results: "Mapping[str, Mapping[str, Agreement]]") -> None:
    """Print, for each output, a row for each of the networks that it is compared with."""
    names = next(iter(results.values()))
    rows = [
        [name, other, f"{100 * found.difference:.2g} %", _percent(found.same_class), _percent(found.identical)]
        for name in names
        for other, found in ((other, agreements[name]) for other, agreements in results.items())
    ]
    print_table(["output", "compared with", "off", "same class", "equal bits"], rows, left=2)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def computed_otherwise(exact: "Agreement") -> bool:
    """Whether a runtime's outputs are further from exact integers than roundings of additions explain."""
    other_classes = exact.same_class is not None and exact.same_class < LEAST_SAME_CLASS
    return exact.difference > (SMALL_DIFFERENCE if other_classes else LARGE_DIFFERENCE)
