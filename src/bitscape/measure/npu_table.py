"""What each layer of a network takes on an NPU at each width of its weights, by the NPU's compiler: a `LatencyTable`.

The network is quantized at each pair of bits in turn and compiled as a whole, for the compiler schedules operators
together: it reads the weights of one while another runs, and keeps tensors on the chip between them. So

    time of a layer     of its operator in the whole network at these bits, and of the operators behind it up to the
                        next layer
    flash of a layer    its weights, encoded from its own codes in a file of its operator alone
    SRAM of a layer     the working memory in use while one of these operators runs

What is stored beside encoded weights (scales, commands) hardly depends on bits, and counts to the first layer. What
the compiler keeps on the chip beside the tensors of an operator, such as the next one's weights, is added to every layer,
so that the peak at 8/8 is the network's.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from bitscape.calling import Inputs
from bitscape.cost.latency import LatencyTable
from bitscape.data.samples import Samples
from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.integer.interface import checked_samples, example_of
from bitscape.exporters.tflite.file import tflite_content, tflite_network
from bitscape.exporters.tflite.flatbuffer import one_operator, operator_weights
from bitscape.measure.baselines import folded
from bitscape.measure.vela import ESTIMATED, Compiled, Vela
from bitscape.models.layers import layer_shapes
from bitscape.models.modes import in_eval_mode
from bitscape.models.prepare import prepare
from bitscape.policy import LayerBits, fingerprint, uniform_policy
from bitscape.progress import track
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.quantizers import Lsq

_log = logging.getLogger("bitscape.exporters")


def build_npu_table(
    network: nn.Module,
    data: Samples | Inputs,
    pairs: Iterable[LayerBits],
    vela: Vela,
    *,
    coarseness: float = 1.0,
) -> LatencyTable:
    """Compile the network at every pair of bits, and every layer for its own.

    Args:
        network: float network; it stays as it is.
        data: samples, or what the network is called with, normalized, two at least, of one shape; they set ranges, and
            so the codes.
        pairs: bits of weights and activations; 8/8 is always compiled.
        vela: the compiler, for an NPU.
        coarseness: of the weights' scales, as in `Lsq`: above 1 the compiler encodes weights in fewer bits.

    Raises:
        BitscapeError: the extra "ethos-u" is missing, the network cannot be written as a TFLite file, or Vela does not
            take the file.
    """
    network = in_eval_mode(prepare(network))
    shapes = layer_shapes(network)
    samples = checked_samples(data, network)
    plain = folded(network, example_of(samples, network))
    quantizer = Lsq(coarseness=coarseness)
    wanted = list(dict.fromkeys([LayerBits.EIGHT, *pairs]))
    found: dict[str, dict[str, _Layer]] = {}
    compiled: dict[str, Compiled] = {}
    for pair in track(wanted, label=f"{vela.accelerator}, bits"):
        quantized = calibrate(with_quantizers(plain, uniform_policy(shapes, pair), quantizer), samples)
        integers = tflite_network(quantized, samples)
        content = tflite_content(integers, samples)
        compiled[str(pair)] = vela.compile(content)
        found[str(pair)] = _layers(content, compiled[str(pair)], integers, vela)
    eight = compiled[str(LayerBits.EIGHT)]
    if eight.on_cpu:
        _log.warning("%s leaves to the CPU, whose time is not known: %s", vela.version, ", ".join(sorted(set(eight.on_cpu))))
    rest = eight.flash_bytes - sum(layer.flash_bytes for layer in found[str(LayerBits.EIGHT)].values())
    beside = eight.sram_bytes - max(layer.sram_bytes for layer in found[str(LayerBits.EIGHT)].values())
    names = list(found[str(LayerBits.EIGHT)])
    extra = {name: rest if at == 0 else 0 for at, name in enumerate(names)}
    return LatencyTable(
        runtime=vela.version,
        machine=f"{vela.accelerator}, {ESTIMATED}",
        threads=1,
        batch_size=1,
        input_shape=tuple(samples.shapes[0]),
        fingerprint=fingerprint(shapes),
        network_ms=eight.ms,
        layers={name: {pair: each[name].ms for pair, each in found.items()} for name in names},
        flash={name: {pair: each[name].flash_bytes + extra[name] for pair, each in found.items()} for name in names},
        coarseness=coarseness,
        sram={name: {pair: each[name].sram_bytes + beside for pair, each in found.items()} for name in names},
    )


class _Layer:
    """What a layer takes, its calls together."""

    def __init__(self) -> None:
        self.ms = 0.0
        self.flash_bytes = 0
        self.sram_bytes = 0


def _layers(content: bytes, compiled: Compiled, network: IntegerNetwork, vela: Vela) -> dict[str, _Layer]:
    """Layer -> what it takes, with the operators behind it up to the next layer."""
    weights = operator_weights(content)
    owners = _owners([network.layers.get(key, "") for key in weights])
    layers = {name: _Layer() for name in dict.fromkeys(owners)}
    for operator in compiled.operators:
        layer = layers[owners[operator.index]]
        layer.ms += operator.ms
        layer.sram_bytes = max(layer.sram_bytes, operator.sram_bytes)
    stored = {key: index for index, key in enumerate(weights) if key in network.layers}
    for index in stored.values():
        layers[owners[index]].flash_bytes += vela.compile(one_operator(content, index)).encoded_bytes
    return layers


def _owners(layers: Sequence[str]) -> list[str]:
    """For each operator the layer that it counts to, from the layers of those that compute one."""
    first = next(name for name in layers if name)
    owners: list[str] = []
    for name in layers:
        owners.append(name or (owners[-1] if owners else first))
    return owners


def predicted(table: LatencyTable, bits: Mapping[str, LayerBits]) -> tuple[float, int]:
    """Milliseconds and bytes of flash that a table says of the layers' bits."""
    ms = sum(table.layers[name][str(pair)] for name, pair in bits.items())
    return ms, sum(table.flash[name][str(pair)] for name, pair in bits.items())
