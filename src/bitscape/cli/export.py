"""`bitscape export`: a quantized network as a file, packed or for a runtime, checked before it is called good."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bitscape.cli.export_report import report_file, report_packed
from bitscape.cli.export_source import ExportSource, packed_option, source_options
from bitscape.cli.options import seed_option
from bitscape.cli.output import amount, print_table
from bitscape.cli.paths import OutputFile


def _out(suffix: str, *also: str, note: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--out", required=True, type=OutputFile(suffix, also), metavar="FILE", help=f"Where the file goes, {suffix}{note}."
    )


@click.group(invoke_without_command=True)
@click.pass_context
def export(context: click.Context) -> None:
    """Write a quantized network as a file."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@export.command()
@source_options
@_out(".safetensors")
@seed_option
def packed(out: Path, **options: Any) -> None:
    """Write bit-packed weights and everything else the network needs, as one safetensors file.

    With --calibration the file is read back, and its outputs compared bit for bit; a file that
    differs is not kept.

    \b
    Example:
      bitscape export packed --model timm:resnet18 --weights resnet18.safetensors \\
        --policy policy.json --calibration train/ --input-size 224 \\
        --normalize imagenet --out resnet18-packed.safetensors
    """
    source = ExportSource.of(options, "packed")
    report_packed(source, source.write_packed(out))


@export.command()
@source_options
@packed_option
@click.option("--int2/--no-int2", default=True, help="Store weights of 2 bits as INT2, which only ONNX Runtime reads.  [default: int2]")
@_out(".onnx")
@seed_option
def onnx(out: Path, int2: bool, **options: Any) -> None:
    """Write an ONNX file for integer kernels of ONNX Runtime, weights in 2, 4 or 8 bits.

    Where layers alone are quantized, tensors between them (residual edges) get 8-bit quantizers, whose ranges come from --calibration; then
    the file is run in ONNX Runtime, and every layer compared with exact integer arithmetic, and every output on images of --calibration
    that set no range. A file that fails is not kept.

    \b
    Example:
      bitscape export onnx --model timm:resnet18 --weights resnet18.safetensors \\
        --policy policy.json --calibration train/ --input-size 224 \\
        --normalize imagenet --out resnet18.onnx
    """
    source = ExportSource.of(options, "onnx")
    report_file(source, source.write(out, "onnx", int2=int2), "onnx-container")


@export.command()
@source_options
@packed_option
@_out(".xml", ".bin", note="; the weights go into a .bin beside it")
@seed_option
def openvino(out: Path, **options: Any) -> None:
    """Write an OpenVINO file, weights in 2, 3, 4, 6 or 8 bits, computed in int8.

    As for `export onnx`, tensors between layers get 8-bit quantizers, whose ranges come from --calibration; then the file is run in
    OpenVINO, and every layer compared with exact integer arithmetic, and every output on images of --calibration that set no range. A
    file that fails is not kept.

    \b
    Example:
      bitscape export openvino --model timm:resnet18 --checkpoint run/ \\
        --calibration train/ --input-size 224 --normalize imagenet \\
        --out resnet18.xml
    """
    source = ExportSource.of(options, "openvino")
    report_file(source, source.write(out, "openvino"), "openvino")


@export.command()
@source_options
@packed_option
@click.option("--int4", is_flag=True, help="Store weights of at most 4 bits as INT4, two a byte.  [default: all as INT8]")
@_out(".tflite")
@seed_option
def tflite(out: Path, int4: bool, **options: Any) -> None:
    """Write a TFLite file for LiteRT, microcontrollers and NPUs: integer operators alone, from int8 images to int8 outputs.

    All tensors, outputs too, get 8 bits, or 16 where the policy says so, with ranges from --calibration; then the file is run in LiteRT,
    and every layer compared with exact integer arithmetic, and every output on images of --calibration that set no range. A file that
    fails is not kept.

    \b
    Example:
      bitscape export tflite --model timm:resnet18 --weights resnet18.safetensors \\
        --policy policy.json --calibration train/ --input-size 224 \\
        --normalize imagenet --out resnet18.tflite
    """
    source = ExportSource.of(options, "tflite")
    report_file(source, source.write(out, "tflite", weights="int4" if int4 else "int8"), "cortex-m" if int4 else "ethos-u")


@export.command()
@source_options
@packed_option
@_out(".onnx")
@seed_option
def qonnx(out: Path, **options: Any) -> None:
    """Write a QONNX file for FINN and hls4ml: every quantizer where the network has it, at its own bits.

    The batch size is 1, as these tools want it. --calibration tells the shape of the images.

    \b
    Example:
      bitscape export qonnx --model timm:resnet18 --checkpoint run/ \\
        --calibration train/ --input-size 224 --normalize imagenet \\
        --out resnet18.onnx
    """
    info = ExportSource.of(options, "qonnx").write(out, "qonnx").info
    rows = [[f"{w} x {a}", f"{macs:,}", f"{w * a * macs:,}"] for (w, a), macs in sorted(info.macs.items())]
    print_table(["weight x activation bits", "MACs", "BitOps"], [*rows, ["all", f"{sum(info.macs.values()):,}", f"{info.bitops:,}"]])
    click.echo(f"{out}: {amount(info.file_bytes, 'B')}, its weights in float32 on their grids; {info.weight_bits:,} bits of weights")
