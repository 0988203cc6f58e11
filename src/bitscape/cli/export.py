"""`bitscape export`: a quantized network as a file, packed or for a runtime, checked before it is called good."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitscape.cli.evaluate import calibration_options
from bitscape.cli.network import ImageSettings, calibrated, load_network, load_trained, normalized_images
from bitscape.cli.options import FILE, FOLDER, all_of, image_options, network_options, seed_option
from bitscape.cli.output import amount, print_table
from bitscape.cli.packed import check_same_outputs, load_packed_network, save_packed_network
from bitscape.cli.parsing import writable
from bitscape.cost.profiles import PROFILES
from bitscape.errors import BitscapeError
from bitscape.files import write_atomic
from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitscape.export.integer_graph import IntegerNetwork
    from bitscape.export.packed import PackedInfo
    from bitscape.export.parity import ParityReport
    from bitscape.export.runtime import OpenVino, Session

BATCH = 32
LEAST_SAME_CLASS = 0.8
"""Share of images below which a runtime must have computed something else; roundings of additions differ in OpenVINO, which costs less."""
PARITY_IMAGES = 16
"""Images whose every code is compared: the reference computes exactly, and slowly."""

_network_options = all_of(
    network_options,
    image_options,
    click.option("--policy", "policy_file", type=FILE, metavar="FILE", help="Quantize by this policy; needs --calibration."),
    calibration_options,
    click.option("--checkpoint", type=FOLDER, metavar="FOLDER", help="Instead: what `bitscape train --policy` left there."),
)
_packed_source = click.option("--packed", type=FILE, metavar="FILE", help="Instead: a packed file of this network.")


def _out(suffix: str, note: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def checked(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
        path = writable(context, parameter, value)
        if path is not None and path.suffix != suffix:
            raise BitscapeError(f"--out {str(path)!r}: by its suffix a runtime knows the file; write e.g. {path.with_suffix(suffix).name}")
        return path

    return click.option("--out", required=True, callback=checked, metavar="FILE", help=f"Where the file goes, {suffix}{note}.")


@click.group(invoke_without_command=True)
@click.pass_context
def export(context: click.Context) -> None:
    """Write a quantized network as a file."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@export.command()
@_network_options
@_out(".safetensors")
@seed_option
def packed(out: Path, **source: Any) -> None:
    """Write bit-packed weights and everything else the network needs, as one safetensors file.

    \b
    Example:
      bitscape export packed --model timm:resnet18 --weights resnet18.safetensors \\
        --policy policy.json --calibration train/ --input-size 224 \\
        --normalize imagenet --out resnet18-packed.safetensors
    """
    given = _Given.of(source)
    info = save_packed_network(given.network, out, given.policy, folded=given.folded)
    if given.images is not None:
        shape = tuple(given.images.shape[1:])
        check_same_outputs(given.network, load_packed_network(out, given.float_network, shape)[0], given.images, out)
    report_bytes(info, given.float_network, given.policy)


@export.command()
@_network_options
@_packed_source
@click.option("--int2/--no-int2", default=True, help="Store weights of 2 bits as INT2, which only ONNX Runtime reads.  [default: int2]")
@_out(".onnx")
@seed_option
def onnx(out: Path, int2: bool, **source: Any) -> None:
    """Write an ONNX file for integer kernels of ONNX Runtime, weights in 2, 4 or 8 bits.

    Where layers alone are quantized, tensors between them (residual edges) get 8-bit quantizers, whose ranges come from --calibration; then
    the file is run in ONNX Runtime, and every layer compared with exact integer arithmetic. A file that fails is not kept.

    \b
    Example:
      bitscape export onnx --model timm:resnet18 --weights resnet18.safetensors \\
        --policy policy.json --calibration train/ --input-size 224 \\
        --normalize imagenet --repair --out resnet18.onnx
    """
    from bitscape.export.onnx_qdq import CONTAINERS, PORTABLE, write_onnx
    from bitscape.export.parity import ALLOWED, check_parity
    from bitscape.export.runtime import OnnxRuntime

    given, runtime = _Given.of(source), OnnxRuntime()
    network, images = given.integer_network()
    with _replaced_if_good(out) as draft:
        info = write_onnx(network, draft, images, containers=CONTAINERS if int2 else PORTABLE)
        _report_file(given, network, info.container_bytes, info.file_bytes, out)
        _report_parity(check_parity(draft, images[:PARITY_IMAGES].numpy(), runtime), ALLOWED["onnxruntime"])
        _report_agreement(given, network, images, runtime.open(draft), runtime.version)
    _report_containers(info.containers, given.policy, "onnx-container")


@export.command()
@_network_options
@_packed_source
@_out(".xml", "; the weights go into a .bin beside it")
@seed_option
def openvino(out: Path, **source: Any) -> None:
    """Write an OpenVINO file, weights in 2, 3, 4, 6 or 8 bits, computed in int8.

    As for `export onnx`, tensors between layers get 8-bit quantizers, whose ranges come from --calibration. Every layer is compared with
    exact integer arithmetic in OpenVINO, in the ONNX form of the network; then the file is run, and its classes are compared with those of
    the exact integer network. A file that fails is not kept.

    \b
    Example:
      bitscape export openvino --model timm:resnet18 --checkpoint run/ \\
        --calibration train/ --input-size 224 --normalize imagenet \\
        --out resnet18.xml
    """
    from bitscape.export.openvino_ir import write_openvino
    from bitscape.export.parity import ALLOWED, require_integer
    from bitscape.export.runtime import OpenVino

    given, runtime = _Given.of(source), OpenVino()
    network, images = given.integer_network()
    with _replaced_if_good(out, out.with_suffix(".bin")) as draft:
        info = write_openvino(network, draft, images)
        _report_file(given, network, info.weight_bytes, info.file_bytes, out)
        _report_parity(_parity_of_layers(network, images, runtime), ALLOWED["openvino"])
        session = runtime.open(draft)
        require_integer(runtime.version, session.float_layers())
        _report_agreement(given, network, images, session, runtime.version)
    _report_containers(info.containers, given.policy, "openvino")


@export.command()
@_network_options
@_packed_source
@_out(".onnx")
@seed_option
def qonnx(out: Path, **source: Any) -> None:
    """Write a QONNX file for FINN and hls4ml: every quantizer where the network has it, at its own bits.

    The batch size is 1, as these tools want it. --calibration tells the shape of the images.

    \b
    Example:
      bitscape export qonnx --model timm:resnet18 --checkpoint run/ \\
        --calibration train/ --input-size 224 --normalize imagenet \\
        --out resnet18.onnx
    """
    from bitscape.export.qonnx import save_qonnx

    given = _Given.of(source)
    info = save_qonnx(given.network.cpu(), out, given.required_images())
    rows = [[f"{w} x {a}", f"{macs:,}", f"{w * a * macs:,}"] for (w, a), macs in sorted(info.macs.items())]
    print_table(["weight x activation bits", "MACs", "BitOps"], [*rows, ["all", f"{sum(info.macs.values()):,}", f"{info.bitops:,}"]])
    click.echo(f"{out}: {amount(info.file_bytes, 'B')}, its weights in float32 on their grids; {info.weight_bits:,} bits of weights")


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What the options say."""

    float_network: "nn.Module"
    network: "nn.Module"
    """Quantized."""
    policy: Policy
    images: "Tensor | None"
    """Of --calibration, normalized."""
    folded: bool
    """Whether the quantized network's norms were folded before it was quantized."""

    @classmethod
    def of(cls, source: dict[str, Any]) -> "_Given":
        """Load the network and quantize it. Raises BitscapeError for options that do not go together."""
        policy_file, checkpoint, packed = source["policy_file"], source["checkpoint"], source.get("packed")
        if sum(option is not None for option in (policy_file, checkpoint, packed)) != 1:
            others = "--checkpoint or --packed" if "packed" in source else "or --checkpoint"
            raise BitscapeError(f"give --policy with --calibration, {others}; exactly one of them")
        if policy_file is not None and source["calibration"] is None:
            raise BitscapeError("--policy and --calibration go together: images set the policy's activation scales")
        if source["repair"] and policy_file is None:
            raise BitscapeError("--repair is for --policy: a network that was trained or packed keeps its weights")
        network = load_network(source["model"], source["weights"], source["device"], source["seed"])
        settings = ImageSettings(input_size=source["input_size"], normalize=source["normalize"]).of_model(network)
        images = None
        if source["calibration"] is not None:
            images = normalized_images(source["calibration"], source["calibration_images"], settings, source["seed"], network)
        quantized, policy, folded = _quantized(network, images, policy_file, checkpoint, packed, source["repair"])
        return cls(float_network=network, network=quantized, policy=policy, images=images, folded=folded)

    def integer_network(self) -> "tuple[IntegerNetwork, Tensor]":
        """Bring the network into integer form, on the CPU; the images, too."""
        from bitscape.export.integer_graph import integer_network

        images = self.required_images()
        return integer_network(self.network.cpu(), images), images

    def required_images(self) -> "Tensor":
        """The images of --calibration, on the CPU."""
        if self.images is None:
            raise BitscapeError("--calibration is missing: images set the ranges of the tensors between the layers, and check the file")
        return self.images.cpu()


def _quantized(
    network: "nn.Module", images: "Tensor | None", policy_file: Path | None, checkpoint: Path | None, packed: Path | None, repair: bool
) -> tuple["nn.Module", Policy, bool]:
    """The quantized network, its policy, and whether norms were folded."""
    if policy_file is not None:
        assert images is not None
        policy = Policy.load(policy_file)
        return calibrated(network, policy, images, repair=repair), policy, repair
    if packed is not None:
        if images is None:
            raise BitscapeError("--packed needs --calibration, which also tells the shape of the images")
        return (*load_packed_network(packed, network, tuple(images.shape[1:])), False)
    assert checkpoint is not None
    quantized, found = load_trained(network, checkpoint)
    if found is None:
        raise BitscapeError(f"{checkpoint} holds a float network; train with --policy, or give --policy here")
    return quantized, found, False


@contextmanager
def _replaced_if_good(*paths: Path) -> Iterator[Path]:
    """Give a draft of the first of the files, elsewhere; if nothing fails within the block, the files are replaced by the drafts."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder) / paths[0].name
        for path in reversed(paths):  # what the first refers to is there before it
            write_atomic(path, (Path(folder) / path.name).read_bytes())


def _report_file(given: _Given, network: "IntegerNetwork", container_bytes: int, file_bytes: int, path: Path) -> None:
    """Print what the file's bytes are made of, and what was added to the network."""
    values = sum(tensor.nbytes for tensor in given.float_network.state_dict().values())
    weights = network.weights.values()
    rows = [
        ["weights, as the policy's bits", sum(given.policy.layers[n].weight * math.prod(s) for n, s in _shapes(given).items()) // 8],
        ["weights, scales and biases, in the file", container_bytes],
        ["  of it scales and biases", 4 * sum(len(w.scale) for w in weights) + 4 * sum(len(b) for b in network.biases.values())],
        ["graph", file_bytes - container_bytes],
        ["file", file_bytes],
        ["float32 tensors", values],
    ]
    print_table(["bytes", ""], [[name, f"{count:,}"] for name, count in rows])
    click.echo(f"{path}: {amount(file_bytes, 'B')}, {values / file_bytes:.2f} times smaller than float32")
    click.echo(f"{len(network.added)} tensors between layers got 8 bits, which the policy does not count")


def _report_containers(containers: dict[str, int], policy: Policy, profile: str) -> None:
    """Print how the weights are really stored, which layers are not integers, and what the bits do on the target."""
    widths = sorted(set(containers.values()))
    counts = (f"{sum(bits == width for bits in containers.values())} in {width} bits" for width in widths)
    click.echo(f"weights of {len(containers)} of {len(policy.layers)} layers are stored as integers: {', '.join(counts)}")
    if floats := [name for name in policy.layers if name not in containers]:
        click.echo(f"in float: {', '.join(floats)}")
    click.echo(PROFILES[profile].note(policy))


def _parity_of_layers(network: "IntegerNetwork", images: "Tensor", runtime: "OpenVino") -> "ParityReport":
    """Parity of an ONNX file with the same layers: OpenVINO's own files cannot be asked for codes between layers without changing them."""
    from bitscape.export.onnx_qdq import PORTABLE, write_onnx
    from bitscape.export.parity import check_parity

    with tempfile.TemporaryDirectory() as folder:
        info = write_onnx(network, Path(folder) / "layers.onnx", images, containers=PORTABLE)
        return check_parity(info.path, images[:PARITY_IMAGES].numpy(), runtime)


def _report_parity(report: "ParityReport", allowed: float) -> None:
    codes, differing = (sum(getattr(layer, name) for layer in report.layers) for name in ("codes", "differing"))
    click.echo(f"{report.runtime}: {len(report.layers)} layers, {differing} of {amount(codes)} codes differ from exact integers")
    report.require(allowed)


def _report_agreement(given: _Given, network: "IntegerNetwork", images: "Tensor", session: "Session", runtime: str) -> None:
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
        simulated = torch.cat([next(tensors_in(given.network(batch))) for batch in images.split(BATCH)])
    exact, before = (agreement(outputs.numpy(), found) for outputs in (run_integers(network, images), simulated))
    click.echo(f"{runtime}, {exact.images} images: class of the exact integer network on {100 * exact.same_class:.1f} %, equal to the")
    click.echo(f"last bit on {100 * exact.identical:.1f} %; class of the network before the export on {100 * before.same_class:.1f} %")
    if exact.same_class < LEAST_SAME_CLASS:
        raise BitscapeError(
            f"{runtime} gives the class of the exact integer network on {100 * exact.same_class:.1f} % of the images only: it computes "
            "the file otherwise than it says; do not use it with this version, or export for another runtime"
        )


def _shapes(given: _Given) -> dict[str, tuple[int, ...]]:
    from bitscape.cli.network import network_shapes

    return network_shapes(given.float_network)


def report_bytes(info: "PackedInfo", network: "nn.Module", policy: Policy) -> None:
    """Print the bytes of a packed file, beside what the policy's bits say and beside float32."""
    from bitscape.cli.network import network_shapes

    shapes = network_shapes(network)
    sizes = {name: policy.layers[name].weight * math.prod(shape) for name, shape in shapes.items()}
    scales = 4 * sum(shape[0] for shape in shapes.values())
    values = sum(t.nbytes for t in network.state_dict().values())
    header = info.file_bytes - info.weight_bytes - info.other_bytes
    rows = [
        ["weights, as the policy's bits", sum(sizes.values()) // 8],
        ["weights and scales, in the file", info.weight_bytes],
        ["  of it scales", scales],
        ["biases, norms, activation scales", info.other_bytes],
        ["header", header],
        ["file", info.file_bytes],
        ["float32 tensors", values],
    ]
    print_table(["bytes", ""], [[name, f"{count:,}"] for name, count in rows])
    click.echo(f"{info.path}: {amount(info.file_bytes, 'B')}, {values / info.file_bytes:.2f} times smaller than float32")
