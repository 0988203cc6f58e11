"""Containers: the widths in which files store integer weights, and the bytes that these take."""

from collections.abc import Mapping, Sequence

from bitscape.errors import BitscapeError
from bitscape.export.integer_graph import IntegerNetwork
from bitscape.export.integer_weights import IntegerWeight


def container(weight: IntegerWeight, containers: Sequence[int]) -> int:
    """Bits of the smallest of `containers` that holds the codes."""
    fitting = [width for width in containers if width >= weight.bits]
    if not fitting:
        raise BitscapeError(f"containers = {containers!r}: weights need {weight.bits} bits; allow 8 as well")
    return min(fitting)


def container_bytes(network: IntegerNetwork, chosen: Mapping[str, int]) -> int:
    """Bytes of weights in the `chosen` containers (name of the weight -> bits), of their scales, and of the biases."""
    weights = sum(packed_bytes(weight.q.numel(), chosen[key]) for key, weight in network.weights.items())
    return weights + network.scale_bytes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take in a constant of `bits`; 3 and 6 bits, OpenVINO's alone, come in whole groups of three bytes."""
    return -(-count * bits // 8) if bits & (bits - 1) == 0 else 3 * -(-count * bits // 24)
