"""Profiles: which bit-widths a target really stores and computes with, for searches that end on it.

Few targets compute below 8 bits; most store narrow weights packed and widen them to int8. What each target says, and where it is
known from:

    cpu-int8        plain int8 files: ONNX QLinearConv and QGemm, OpenVINO, XNNPACK and oneDNN kernels all take 8-bit operands.
    onnx-container  ONNX DequantizeLinear reads INT4 from opset 21 and INT2 from opset 25; its integer operators (QLinearConv,
                    MatMulInteger) know 8 bits only. Weights stored as INT2 or INT4 and cast to INT8 reach the int8 kernels of ONNX
                    Runtime. Activations of 2 to 8 bits can be written as a clip of 8-bit codes, which costs time and saves none,
                    so that narrower ones are not offered.
    openvino        OpenVINO's element types u2, u3, u4, u6 and i8 as weight constants, converted to int8 when the network is loaded.
    fpga-bitops     QONNX, which FINN and hls4ml build dataflow hardware from: any width for each tensor, and logic grows with the
                    product of the widths; qonnx reports it as `total_bops`.
    cortex-m        CMSIS-NN: kernels `*_s8`, and `*_s4` with 4-bit weights unpacked to 8 bits; activations int8.
    ethos-u         Arm's compiler Vela for Ethos-U NPUs takes int8 files and compresses weights without loss: b-bit values cost
                    about b bits in flash, and time where reading the flash bounds a layer; it computes in int8.
    htp             Qualcomm AI Engine Direct: activations of 8 or 16 bits. By its guidelines, int4 weights pay in 1x1 convolutions
                    of stride 1 and in fully connected layers, each with more than 32 outputs, and in time only by the smaller
                    transfer of weights.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitscape.errors import BitscapeError
from bitscape.policy import ACTIVATION_BITS, MAX_BITS, WEIGHT_BITS, LayerBits, Policy

if TYPE_CHECKING:  # it would bring torch, and the command line lists targets in its help
    from bitscape.cost.latency import LatencyTable
    from bitscape.cost.layers import LayerCost, NetworkProfile

EIGHT = LayerBits(8, 8)
ETHOS_U = (
    *(f"ethos-u55-{macs}" for macs in (32, 64, 128, 256)),
    *(f"ethos-u65-{macs}" for macs in (256, 512)),
    *(f"ethos-u85-{macs}" for macs in (128, 256, 512, 1024, 2048)),
)
"""NPUs that Vela compiles for, with their MACs a cycle."""
HTP_OUTPUTS = 32  # int4 weights pay with more outputs than these


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one target stores and computes. Raises BitscapeError for widths that no layer can have, or without 8 among them."""

    name: str
    """Name of the target."""
    what: str
    """What it is, in one sentence."""
    weight_bits: tuple[int, ...]
    """Widths that weights are really stored at."""
    activation_bits: tuple[int, ...] = (8,)
    """Widths of activations that make a difference there."""
    computes_int8: bool = True
    """Whether every layer is computed in int8 whatever its bits; else each at its own bits."""
    gain: str = "they make the file smaller, not the network faster"
    """What fewer than 8 weight bits do there."""
    narrow: "Callable[[LayerCost], bool]" = lambda layer: True
    """Whether a layer may have fewer than 8 weight bits; those that may not are pinned at 8/8."""
    runtimes: tuple[str, ...] = ()
    """Runtimes of `bitscape latency build` that stand for the target."""

    def __post_init__(self) -> None:
        for argument, widths, allowed in (
            ("weight_bits", self.weight_bits, WEIGHT_BITS),
            ("activation_bits", self.activation_bits, ACTIVATION_BITS),
        ):
            if MAX_BITS not in widths or not set(widths) <= set(allowed):
                listed = _widths(allowed)
                raise BitscapeError(f"target {self.name!r}: {argument}={widths!r}; allowed are {listed}, 8 among them")

    def compute_bits(self, bits: LayerBits) -> LayerBits:
        """Return the bits that a layer's arithmetic runs at."""
        if bits.is_float or not self.computes_int8:
            return bits
        return LayerBits(MAX_BITS, max(MAX_BITS, bits.activation))

    def stored_bits(self, weight: int) -> int:
        """Return the smallest stored width that holds weights of `weight` bits."""
        return min(width for width in self.weight_bits if width >= weight)

    def stored(self, policy: Policy) -> Policy:
        """Return the policy with every layer's weights at the width they are stored in."""
        layers = {
            name: bits if bits.is_float else replace(bits, weight=self.stored_bits(bits.weight))
            for name, bits in policy.layers.items()
        }
        return replace(policy, layers=layers)

    def allows(self, bits: LayerBits) -> bool:
        """Tell whether both widths are the target's own."""
        return bits.weight in self.weight_bits and bits.activation in self.activation_bits

    def check(self, argument: str, pairs: Iterable[LayerBits]) -> None:
        """Raise BitscapeError, naming the argument, if the target does not have all of these pairs."""
        if foreign := [str(bits) for bits in pairs if not self.allows(bits)]:
            raise BitscapeError(
                f"{argument}: {', '.join(foreign)} weight/activation bits are not what target {self.name} stores and computes: "
                f"weights of {_widths(self.weight_bits)} and activations of {_widths(self.activation_bits)} bits; "
                "keep to these, or search without the target"
            )

    def pins(self, network: "NetworkProfile") -> dict[str, LayerBits]:
        """Return the layers that must stay at 8/8, with these bits."""
        return {layer.name: EIGHT for layer in network.layers if not self.narrow(layer)}

    def check_pinned(self, pinned: Mapping[str, LayerBits], network: "NetworkProfile") -> None:
        """Raise BitscapeError for a pinned layer at bits that the target does not have for it; any runs layers in float."""
        for name, bits in pinned.items():
            if bits.is_float:
                continue
            self.check(f"pinned: layer {name!r}", [bits])
            if bits.weight < MAX_BITS and not self.narrow(network.by_name[name]):
                raise BitscapeError(
                    f"pinned: layer {name!r} at {bits}: target {self.name} gives this layer 8 weight bits ({self.what}); "
                    "pin it at 8/8, or leave it out"
                )

    def runtime_note(self, table: "LatencyTable") -> str | None:
        """Say so if `table` was measured in a runtime that stands for other targets; None where it fits, or is of a runtime of its own."""
        runtime = table.runtime.partition(" ")[0]
        fitting = [each.name for each in TARGETS.values() if runtime in each.runtimes]
        if not fitting or runtime in self.runtimes:
            return None
        there = f"measure there: bitscape latency build --runtime {self.runtimes[0]}" if self.runtimes else "leave the table out"
        return (
            f"latency table ({table.where}) was measured in {runtime}, and target {self.name} is of another target ({self.what}): "
            f"its milliseconds are not those of that target; {there}, or take target {' or '.join(fitting)}"
        )

    def note(self, policy: Policy) -> str:
        """Say what the bits of `policy` do on the target, and what they do not."""
        layers = policy.layers.values()
        narrow = [bits.weight for bits in layers if bits.weight < MAX_BITS]
        have = f"{self.name}: {len(narrow)} of {len(layers)} layers have fewer than 8 weight bits"
        if not self.computes_int8:
            return f"{have}: this target stores and computes each layer at its own bits; every bit counts, of activations too"
        packed = any(self.stored_bits(bits) < MAX_BITS for bits in narrow)
        how = f"stores them packed and computes all of them in int8; {self.gain}" if packed else "stores and computes all of them in int8"
        texts = [f"{have}: this target {how}" if narrow else have]
        if wider := sorted({bits for bits in narrow if self.stored_bits(bits) > bits}):
            texts.append(f"stored wider: {', '.join(f'{bits} bits in {self.stored_bits(bits)}' for bits in wider)}")
        if few := sum(bits.activation < MAX_BITS for bits in layers):
            texts.append(f"{few} have activations below 8 bits, which gain nothing here")
        return "; ".join(texts)


def _widths(widths: tuple[int, ...]) -> str:
    return ", ".join(map(str, widths))


def _on_htp(layer: "LayerCost") -> bool:
    outputs, inputs, *kernel = layer.weight_shape
    # As many positions leave as enter: stride 1. With groups the counts differ, and the layer stays at 8 bits.
    positions_kept = layer.input_elements * outputs == layer.output_elements * inputs
    pointwise = layer.kind == "Conv2d" and kernel == [1, 1] and positions_kept
    return outputs > HTP_OUTPUTS and (layer.kind == "Linear" or pointwise)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu-int8",
            what="plain int8 files on CPUs: every layer at 8/8",
            weight_bits=(8,),
            runtimes=("onnxruntime", "openvino"),
        ),
        Target(
            name="onnx-container",
            what="ONNX files with weights in 2, 4 or 8 bits, widened to int8 when ONNX Runtime loads them",
            weight_bits=(2, 4, 8),
            runtimes=("onnxruntime",),
        ),
        Target(
            name="openvino",
            what="OpenVINO files with weights in 2, 3, 4, 6 or 8 bits, computed in int8",
            weight_bits=(2, 3, 4, 6, 8),
            runtimes=("openvino",),
        ),
        Target(
            name="fpga-bitops",
            what="dataflow hardware on FPGAs, built by FINN or hls4ml from QONNX: every width from 1 to 8 counts",
            weight_bits=tuple(range(1, 9)),
            activation_bits=(*range(1, 9), 16),
            computes_int8=False,
        ),
        Target(
            name="cortex-m",
            what="CMSIS-NN on Cortex-M microcontrollers: weights in 4 or 8 bits, computed in int8",
            weight_bits=(4, 8),
            gain="they halve the flash that these weights take; that they save time is not known",
        ),
        Target(
            name="ethos-u",
            what="Arm Ethos-U NPUs: weights of 2 to 8 bits, which the compiler Vela compresses to about as many, computed in int8",
            weight_bits=(2, 3, 4, 5, 6, 7, 8),
            gain="they save flash, and by Vela's performance model time where reading the flash bounds a layer",
            runtimes=("vela",),
        ),
        Target(
            name="htp",
            what="Qualcomm HTP: 4-bit weights in linear layers and 1x1 convolutions of stride 1 with more than 32 outputs, else 8",
            weight_bits=(4, 8),
            activation_bits=(8, 16),
            gain="they make the file smaller, and save time only where loading the weights takes it",
            narrow=_on_htp,
        ),
    )
}
"""Name -> target."""
FILES = {"ONNX": "onnx-container", "OpenVINO": "openvino"}
"""Kinds of files that `bitscape export` writes for runtimes -> the target of what they store."""


def container_bytes(network: "NetworkProfile", policy: Policy) -> dict[str, int]:
    """Return, for each kind of file in `FILES` that stores some weights of `policy` wider than packed files do, the bytes they take there.

    Counted as `weight_bytes` counts: weights and their scales.
    """
    from bitscape.cost.policy_cost import weight_bytes

    stored = {kind: weight_bytes(network, TARGETS[name].stored(policy)) for kind, name in FILES.items()}
    return {kind: count for kind, count in stored.items() if count > weight_bytes(network, policy)}
