"""What `bitscape export` prints of a file: its bytes, its containers, and how a runtime's results agree with exact integers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.cli.export_source import ExportSource
from bitscape.cli.network import network_shapes
from bitscape.cli.output import amount, print_table, size_ratio
from bitscape.cost.profiles import PROFILES
from bitscape.errors import BitscapeError
from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from bitscape.export.agreement import Agreement
    from bitscape.export.integer_graph import IntegerNetwork
    from bitscape.export.packed import PackedInfo
    from bitscape.export.parity import ParityReport
    from bitscape.export.runtime import Session

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
    from bitscape.export.containers import scale_bytes

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


def report_containers(containers: dict[str, int], policy: Policy, profile: str) -> None:
    """Print how the weights are really stored, which layers are not integers, and what the bits do on the target."""
    widths = sorted(set(containers.values()))
    counts = (f"{sum(bits == width for bits in containers.values())} in {width} bits" for width in widths)
    click.echo(f"weights of {len(containers)} of {len(policy.layers)} layers are stored as integers: {', '.join(counts)}")
    if floats := [name for name in policy.layers if name not in containers]:
        click.echo(f"in float: {', '.join(floats)}")
    click.echo(PROFILES[profile].note(policy))


def report_parity(report: "ParityReport", allowed: float) -> None:
    """Print how many codes differ. Raises BitscapeError if more than the share `allowed` of a layer does."""
    found = f"{report.differing_codes} of {amount(report.codes)} codes differ from exact integers"
    click.echo(f"{report.runtime}: {len(report.layers)} layers, {found}")
    report.require(allowed)


def report_agreement(source: ExportSource, network: "IntegerNetwork", images: "Tensor", session: "Session", runtime: str) -> None:
    """Print on how many images the runtime's class is that of exact integers, and that of the network as it was simulated."""
    import numpy as np
    import torch

    from bitscape.export.agreement import agreement
    from bitscape.export.integer_execution import run_integers
    from bitscape.quant.chains import tensors_in

    found = np.concatenate([session.run(batch.numpy())[0] for batch in images.split(BATCH)])
    if found.ndim != 2:
        click.echo(f"outputs of shape {found.shape[1:]} an image are no classes: the whole network is not compared")
        return
    with torch.no_grad():
        simulated = torch.cat([next(tensors_in(source.network(batch))) for batch in images.split(BATCH)])
    exact, before = (agreement(outputs.numpy(), found) for outputs in (run_integers(network, images), simulated))
    same, off, equal = 100 * exact.same_class, 100 * exact.difference, 100 * exact.identical
    click.echo(f"{runtime}, {exact.images} images: class of the exact integer network on {same:.1f} %; outputs {off:.2g} % off,")
    click.echo(f"equal to the last bit on {equal:.1f} %; class of the network before the export on {100 * before.same_class:.1f} %")
    if computed_otherwise(exact):
        raise BitscapeError(
            f"{runtime} gives the class of the exact integer network on {same:.1f} % of the images, and outputs that are {off:.2g} % off: "
            "it computes the file otherwise than it says; do not use it with this version, or export for another runtime"
        )


def computed_otherwise(exact: "Agreement") -> bool:
    """Whether a runtime's outputs are further from exact integers than roundings of additions explain."""
    return exact.difference > (SMALL_DIFFERENCE if exact.same_class < LEAST_SAME_CLASS else LARGE_DIFFERENCE)
