"""What `bitscape export` prints of a file: its bytes, its containers, and how a runtime's results agree with exact integers."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from bitscape.cli.export_source import ExportSource
from bitscape.cli.network import network_shapes
from bitscape.cli.output import amount, print_table, size_ratio
from bitscape.cli.packed import report_same
from bitscape.cost.targets import TARGETS
from bitscape.policy import Policy

if TYPE_CHECKING:
    from bitscape.exporters.agreement import Agreement
    from bitscape.exporters.onnx.qdq import OnnxInfo
    from bitscape.exporters.openvino.ir import OpenvinoInfo
    from bitscape.exporters.packed.file import PackedInfo
    from bitscape.exporters.parity import ParityReport
    from bitscape.exporters.tflite.file import TfliteInfo
    from bitscape.verbs.export import ExportReport


def report_packed(source: ExportSource, report: "ExportReport") -> None:
    """Print the bytes of a packed file, and whether it was read back."""
    info: PackedInfo = report.info
    if report.compared:
        report_same(report.compared)
    parts = {
        "weights and scales, in the file": info.weight_bytes,
        "  of it scales": info.scale_bytes,
        "biases, norms, activation scales": info.other_bytes,
        "header": info.file_bytes - info.weight_bytes - info.other_bytes,
    }
    _print_bytes(source, parts, report)


def report_file(source: ExportSource, report: "ExportReport", target: str) -> None:
    """Print all of a runtime's file: its bytes, how the runtime computes it, and how weights are stored on the target."""
    info: OnnxInfo | OpenvinoInfo | TfliteInfo = report.info
    parts = {
        "weights, scales and biases, in the file": info.container_bytes,
        "  of it scales and biases": info.scale_bytes,
        "graph": report.file_bytes - info.container_bytes,
    }
    _print_bytes(source, parts, report)
    click.echo(f"{info.added} tensors between layers got 8 bits, which the policy does not count")
    if report.parity is not None:
        report_parity(report.parity)
    report_agreement(source, report)
    report_containers(info.containers, source.policy, target)


def _print_bytes(source: ExportSource, parts: Mapping[str, int], report: "ExportReport") -> None:
    """Print what a file is made of, beside what the policy's bits say and beside float32."""
    shapes = network_shapes(source.float_network)
    weights = sum(source.policy.layers[name].weight * math.prod(shape) for name, shape in shapes.items()) // 8
    values = sum(tensor.nbytes for tensor in source.float_network.state_dict().values())
    rows = {"weights, as the policy's bits": weights, **parts, "file": report.file_bytes, "float32 tensors": values}
    print_table(["bytes", ""], [[name, f"{count:,}"] for name, count in rows.items()])
    click.echo(f"{report.path}: {amount(report.file_bytes, 'B')}, {size_ratio(values / report.file_bytes)} than float32")


def report_containers(containers: dict[str, int], policy: Policy, target: str) -> None:
    """Print how the weights are really stored, which layers are not integers, and what the bits do on the target."""
    widths = sorted(set(containers.values()))
    counts = (f"{sum(bits == width for bits in containers.values())} in {width} bits" for width in widths)
    click.echo(f"weights of {len(containers)} of {len(policy.layers)} layers are stored as integers: {', '.join(counts)}")
    if floats := [name for name in policy.layers if name not in containers]:
        click.echo(f"in float: {', '.join(floats)}")
    click.echo(TARGETS[target].note(policy))


def report_parity(report: "ParityReport") -> None:
    """Print how many codes differ."""
    differing = f"{report.differing_codes} of {amount(report.codes)} codes differ from exact integers"
    click.echo(f"{report.runtime}: {len(report.layers)} layers, {differing}")
    for layer in report.fixed_point:
        click.echo(
            f"{layer.name}: multiplied in fixed point, so that {layer.differing} of {layer.codes:,} codes are the one beside what one "
            "rounding gives"
        )
    if report.float_outputs:
        kinds = "transposed, of 16-bit activations, or of float outputs"
        names = ", ".join(report.float_outputs)
        click.echo(f"computed in float, for it has no integer kernel for these ({kinds}): {names}")


def report_agreement(source: ExportSource, report: "ExportReport") -> None:
    """Print how far the outputs agree with exact integers, and with the network before the export, and on which images."""
    _print_agreement({"exact integers": report.exact, "before the export": report.simulated})
    click.echo(f"{report.runtime}, compared on {source.compared_on}")


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
