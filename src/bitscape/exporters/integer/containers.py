"""Containers: the widths in which files store integer weights, and the bytes that these take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitscape.errors import BitscapeError
from bitscape.exporters.integer.form import IntegerNetwork
from bitscape.exporters.integer.weights import IntegerWeight


def container(weight: IntegerWeight, containers: Sequence[int]) -> int:
    """Bits of the smallest of `containers` that holds the codes."""
    fitting = [width for width in containers if width >= weight.bits]
    if not fitting:
        raise BitscapeError(f"containers = {containers!r}: weights need {weight.bits} bits; allow 8 as well")
    return min(fitting)


def layer_containers(network: IntegerNetwork, containers: Sequence[int]) -> dict[str, int]:
    """Layer -> bits of the container of its weights; of a layer that runs several times, the widest of its calls."""
    chosen: dict[str, int] = {}
    for key, weight in network.weights.items():
        layer = network.layers[key]
        chosen[layer] = max(chosen.get(layer, 0), container(weight, containers))
    return chosen


def container_bytes(network: IntegerNetwork, containers: Sequence[int]) -> int:
    """Bytes of weights, each in the smallest of `containers`, of their scales, and of the biases; equal ones count once, as in files."""
    distinct = {_content(weight.q): weight for weight in network.weights.values()}.values()
    return scale_bytes(network) + sum(packed_bytes(weight.q.numel(), container(weight, containers)) for weight in distinct)


def scale_bytes(network: IntegerNetwork) -> int:
    """Bytes of the weights' scales, float32, and of the biases, int32, in a file."""
    scales = {_content(weight.scale): len(weight.scale) for weight in network.weights.values()}
    biases = {_content(bias): len(bias) for bias in network.biases.values()}
    return 4 * (sum(scales.values()) + sum(biases.values()))


def _content(tensor: Tensor) -> tuple[torch.Size, bytes]:
    return tensor.shape, tensor.cpu().numpy().tobytes()


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take in a constant of `bits`; 3 and 6 bits, OpenVINO's alone, come in whole groups of three bytes."""
    return -(-count * bits // 8) if bits & (bits - 1) == 0 else 3 * -(-count * bits // 24)
