"""A quantized network as a graph of torch operators, each of its input quantizers one node: what the exporters start from.

Only exporting traces a network, with `torch.export`; searching and training do not.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from bitscape.calling import Inputs
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, first_line, prefixed
from bitscape.exporters.codes import weight_codes
from bitscape.exporters.integer.interface import Interface, checked_samples, example_of
from bitscape.models.copies import copied
from bitscape.models.layers import has_weight
from bitscape.models.modes import in_eval_mode
from bitscape.policy import LayerBits
from bitscape.quant.functional import MINIMUM_SCALE
from bitscape.quant.layers import QuantizedLayer, require_quantized, static_bits
from bitscape.quant.quantizers.base import Codes, FakeQuantizer
from bitscape.quant.quantizers.lsq_plus import LsqPlusActivation
from bitscape.quant.quantizers.pact import PactActivation

_log = logging.getLogger("bitscape.exporters")
aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
LINEAR = aten.linear.default
BYTE, WORD = 2**8 - 1, 2**16 - 1
"""Largest codes of the types that integer graphs hold activations in."""
VIEWS = {aten.view.default, aten._unsafe_view.default}
PADDINGS = {aten.pad.default, aten.constant_pad_nd.default}


@dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """Grid of one activation tensor: real = scale * (q - zero_point), q from qmin to qmax."""

    scale: float
    zero_point: float
    qmin: int
    qmax: int

    @property
    def is_wide(self) -> bool:
        """Whether its codes, from 0 in integer form, take more than a byte: activations of 16 bits."""
        return max(self.qmax, self.zero_point) > BYTE or self.qmax - self.qmin > BYTE

    @property
    def top(self) -> int:
        """Largest code of the type that holds the codes of the integer form."""
        return WORD if self.is_wide else BYTE

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of `x` as float32, rounded as ONNX's QuantizeLinear does: half to even, before a whole zero point is added."""
        scaled = x / x.new_tensor(self.scale)  # a tensor: by a number, a GPU multiplies with the reciprocal
        whole = float(self.zero_point).is_integer()
        codes = scaled.round_().add_(self.zero_point) if whole else scaled.add_(self.zero_point).round_()
        return codes.clamp_(self.qmin, self.qmax)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Real values of float32 `codes`."""
        return (codes - self.zero_point) * codes.new_tensor(self.scale)


@torch.library.custom_op("bitscape::fake_quantize", mutates_args=())
def _fake_quantize(x: Tensor, scale: float, zero_point: float, qmin: int, qmax: int) -> Tensor:
    grid = ActivationGrid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)
    return grid.dequantize(grid.quantize(x))


@_fake_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: float, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


FAKE_QUANTIZE = torch.ops.bitscape.fake_quantize.default


def grid_of(node: fx.Node) -> ActivationGrid:
    """The grid of a fake-quantize node."""
    _, scale, zero_point, qmin, qmax = node.args
    return ActivationGrid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax)  # type: ignore[arg-type]  # numbers, see the op


def is_quantizer(node: fx.Node) -> bool:
    """Whether it is a fake-quantize node."""
    return node.target is FAKE_QUANTIZE


def set_grid(node: fx.Node, grid: ActivationGrid) -> None:
    """Give a fake-quantize node another grid."""
    node.args = (node.args[0], grid.scale, grid.zero_point, grid.qmin, grid.qmax)


def insert_quantizer(graph: fx.Graph, after: fx.Node, grid: ActivationGrid) -> fx.Node:
    """Add a fake-quantize node behind `after`; who takes its value is for the caller to say."""
    with graph.inserting_after(after):
        return graph.call_function(FAKE_QUANTIZE, (after, grid.scale, grid.zero_point, grid.qmin, grid.qmax))


@dataclass(frozen=True, eq=False)
class Traced:
    """What `trace` makes of a network."""

    module: fx.GraphModule
    """Runs like the network; weights are attributes under their names in the network, dequantized."""
    codes: dict[str, Codes]
    """Name of a quantized weight, such as "conv1.weight" -> its integers."""
    bits: dict[str, LayerBits]
    """The same names -> bits of weight and input."""
    interface: Interface
    """What the network takes and returns; the module takes its tensors, one argument each."""

    def weight_name(self, node: fx.Node) -> str | None:
        """Name of the quantized weight of a convolution or linear node; None for any other node."""
        weight = node.args[1] if node.target in {*CONVOLUTIONS, *TRANSPOSED, LINEAR} else None
        return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target in self.codes else None

    def is_layer(self, node: fx.Node) -> bool:
        """Whether it is a convolution or linear node of a quantized weight."""
        return self.weight_name(node) is not None


def layer_of(weight: str) -> str:
    """Name of the layer of a weight; of the weight "weight" the network itself, ""."""
    return weight.removesuffix("weight").removesuffix(".")


def trace(network: nn.Module, example: Samples | Inputs) -> Traced:
    """Trace a calibrated network of static bits; the batch size stays free.

    Args:
        network: what `quantize` and `calibrate` returned, a trained one or `load_packed`'s; it stays as it is.
        example: samples, or what the network is called with, normalized; two samples at least, of one shape. An input
            whose first size is not the number of samples keeps its shape.

    Raises:
        BitscapeError: no quantized layer, scales that are not set, or a forward that torch.export cannot follow.
    """
    model = in_eval_mode(copied(network))
    layers = require_quantized(model, "network")
    samples = checked_samples(example, model)
    codes, bits = {}, {}
    if multiplied := [name for name, layer in layers.items() if not has_weight(layer)]:
        raise BitscapeError(
            f"network: {', '.join(multiplied)} are products of two activations at few bits, which graphs are not written with yet; "
            "use a packed file, or quantize by a policy without them"
        )
    for name, layer in layers.items():
        if not getattr(layer.input_quantizer, "initialized", True):
            layer.input_quantizer = _NeverCalibrated(name)  # no obstacle where the layer never runs
            continue
        key = f"{name}.weight" if name else "weight"  # see `layer_of`
        with prefixed(f"layer {name}"):
            codes[key], grid = weight_codes(layer), activation_grid(layer.input_quantizer)
        bits[key] = static_bits(layer)
        _make_traceable(layer, codes[key], grid)
    with quiet(), torch.no_grad():
        interface = Interface.of(model, samples)
        advice = ", or use `bitscape export packed`, which needs no tracing"
        program = export_program(model, interface, example_of(samples, model), otherwise=advice)
        # Functional form: without in-place operators, one value has one name.
        module = program.run_decompositions({}).module()
    _tidy(module)
    _use_first_names(model, module)
    _warn_of_lost(codes, module)
    return Traced(module, codes, bits, interface)


def export_program(
    network: nn.Module, interface: Interface, example: Inputs, *, otherwise: str = ""
) -> torch.export.ExportedProgram:
    """What torch.export makes of `network`, called with two samples at least; the batch size stays free.

    It takes the tensors of `interface`, and returns a tensor if the network does, otherwise a dict by name.

    Raises:
        BitscapeError: a forward that it cannot follow; the advice ends in `otherwise`.
    """
    try:
        with interface.called_flat(network, example):
            tensors = tuple(interface.tensors(example))
            return torch.export.export(network, tensors, dynamic_shapes=interface.free_batch())
    except Exception as error:
        raise BitscapeError(
            f"network: torch.export cannot follow its forward ({type(error).__name__}: {first_line(error)}); write it without branches on "
            f"values and with x.shape[0] for len(x){otherwise}"
        ) from error


def _make_traceable(layer: QuantizedLayer, codes: Codes, grid: ActivationGrid) -> None:
    """Put the dequantized weight and a one-node input quantizer into `layer`."""
    layer.weight = nn.Parameter(codes.dequantize(), requires_grad=False)
    layer.weight_quantizer = nn.Identity()
    layer.input_quantizer = _OneNode(grid)


class _NeverCalibrated(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        raise BitscapeError(f"layer {self.layer}: its input scale is not set: call bitscape.quantize(model, policy, data), which sets it")


class _OneNode(nn.Module):
    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        g = self.grid
        return torch.ops.bitscape.fake_quantize(x, g.scale, g.zero_point, g.qmin, g.qmax)  # type: ignore[no-any-return]  # untyped


def activation_grid(quantizer: nn.Module) -> ActivationGrid:
    """Scale, zero point and limits of a calibrated input quantizer.

    Raises:
        BitscapeError: not calibrated, not one of bitscape's, or bits per image.
    """
    if not isinstance(quantizer, FakeQuantizer) or isinstance(quantizer.bits, Tensor):
        raise BitscapeError(f"its input quantizer ({type(quantizer).__name__}) has no one bit-width; quantize with a static policy")
    if not quantizer.initialized:
        raise BitscapeError("its input scale is not set: call bitscape.quantize(model, policy, data), which sets it")
    zero_point = quantizer.grid.zero_point
    scale = float(torch.as_tensor(quantizer.scale).detach().clamp(min=MINIMUM_SCALE))
    qmin, qmax = int(quantizer.grid.qmin), int(quantizer.grid.qmax)
    if isinstance(quantizer, LsqPlusActivation):
        zero_point = -float(quantizer.offset.detach()) / scale
    if isinstance(quantizer, PactActivation) and quantizer.signed and not zero_point:
        qmin = -qmax  # it clips to -clip..clip first
    return ActivationGrid(scale=scale, zero_point=float(zero_point), qmin=qmin, qmax=qmax)


def _tidy(module: fx.GraphModule) -> None:
    """Make the graph one that can be changed and exported again.

    torch.export's check of the input's shape goes, and padding by nothing, which keeps runtimes from their integer kernels. A view asks for
    strides that the tensor may not have the second time; a reshape does not, and attention, whose strides depend on the kernel, is copied.
    """
    for node in list(module.graph.nodes):
        if node.target in VIEWS:
            node.target = aten.reshape.default
        if node.target in PADDINGS and not any(node.args[1]):
            node.replace_all_uses_with(node.args[0])
        if node.target is aten.scaled_dot_product_attention.default:
            with module.graph.inserting_after(node):
                copied = module.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
                copied.meta = dict(node.meta)
            node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
        if node.op == "call_module" and not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _use_first_names(model: nn.Module, module: fx.GraphModule) -> None:
    """Let what is reachable by several names go by the first, as everywhere in bitscape; torch.export takes the last."""
    first: dict[nn.Module, str] = {}
    for name, owner in model.named_modules(remove_duplicate=False):
        first.setdefault(owner, name)
    for node in module.graph.nodes:
        name, _, attribute = str(node.target).rpartition(".")
        if node.op == "get_attr" and name and (known := first[model.get_submodule(name)]) != name:
            module.add_submodule(known, module.get_submodule(name))
            node.target = f"{known}.{attribute}"


def _warn_of_lost(codes: dict[str, Codes], module: fx.GraphModule) -> None:
    """Forget weights that the graph does not use under their own name, and say so."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for key in [key for key in codes if key not in used]:
        del codes[key]
        _log.warning("layer %s: not part of the traced graph, or its weight is computed there; it is not exported as codes", key)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's and onnxscript's own warnings and progress while a network is traced."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
