"""What a policy costs on a measured network: BitOps, storage, mean bits, activation memory.

Conventions, for one image at the network's input shape, pinned layers included; layers that are never called count with what is
stored of them:

    bitops                 sum over layers of macs * weight_bits * activation_bits; norms and biases not counted
    weight_bytes           sum of ceil(weights * weight_bits / 32) * 4 + 4 * scales: each layer packed to whole 32-bit
                           words, one float32 scale per output channel; layers that stay float have 32 bits and no scales
    mean_weight_bits       sum of weights * weight_bits / sum of weights
    mean_activation_bits   sum of input_elements * activation_bits / sum of input_elements
    peak_activation_bytes  maximum over layers of ceil(input_elements * activation_bits / 8) + output_elements: a layer
                           holds its input at its own bits and hands its output on at 8 bits; tensors kept for skip
                           connections are not counted
    latency_ms             sum of the layers' measured milliseconds, scaled to those of the whole network; of a batch of the size
                           that was measured. Known only with a latency table of the target machine: `latency.with_latency`
    flash_bytes            sum of the layers' weights as the target's compiler encodes them, and what else it stores. Known only
                           with a table of a compiler: `bitscape latency build --runtime vela`
    sram_bytes             maximum over layers of the working memory in use while one runs, by the same table

Each cost is a row of `CAPS`: an integer per layer, combined by sum or maximum, over a denominator that only the network
decides. So a cap on any of them is one integer limit on the combined per-layer integers, and the integer programme and
the checks treat every cost alike.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal

from bitscape.cost.layers import LayerCost, NetworkProfile
from bitscape.errors import BitscapeError, nearest
from bitscape.policy import LayerBits, Policy


def layer_bitops(layer: LayerCost, bits: LayerBits) -> int:
    """MACs times both bit-widths."""
    return layer.macs * bits.weight * bits.activation


def layer_weight_bytes(layer: LayerCost, bits: LayerBits) -> int:
    """Bytes of the packed weight, in whole 32-bit words, and of its float32 scales."""
    return -(-layer.weights * bits.weight // 32) * 4 + (0 if bits.is_float else 4 * layer.scales)


def layer_activation_bytes(layer: LayerCost, bits: LayerBits) -> int:
    """Bytes of the input at the layer's bits, and of the output at 8 bits, both alive while it runs."""
    return -(-layer.input_elements * bits.activation // 8) + layer.output_elements


def layer_latency_ns(layer: LayerCost, bits: LayerBits) -> int:
    """Measured nanoseconds, scaled to the network. Raises BitscapeError without a table, or if it lacks this pair."""
    if not layer.calls:
        return 0
    if bits not in layer.latency_ns:
        if not layer.latency_ns:
            raise BitscapeError(f"latency_ms: {NO_TABLE}")
        raise BitscapeError(
            f"latency_ms: layer {layer.name!r} was not measured at {bits} weight/activation bits, "
            f"only at {', '.join(map(str, layer.latency_ns))}; offer and pin these only (--candidates, --target, --pin), "
            "or measure the others too: bitscape latency build"
        )
    return layer.latency_ns[bits]


def layer_flash_bytes(layer: LayerCost, bits: LayerBits) -> int:
    """Encoded bytes, by a compiler. Raises BitscapeError as `layer_latency_ns`, or for a table without them."""
    return _compiled("flash_bytes", layer, layer.flash_bytes, bits)


def layer_sram_bytes(layer: LayerCost, bits: LayerBits) -> int:
    """Bytes of working memory in use, by a compiler. Raises BitscapeError as `layer_flash_bytes`."""
    return _compiled("sram_bytes", layer, layer.sram_bytes, bits)


def _compiled(kind: str, layer: LayerCost, found: Mapping[LayerBits, int], bits: LayerBits) -> int:
    if not layer.calls:
        return 0
    layer_latency_ns(layer, bits)  # names the pair that was not measured
    if not found:
        raise BitscapeError(f"{kind}: the latency table has times alone; compile one with `bitscape latency build --runtime vela`")
    return found[bits]


NO_TABLE = (
    "no latency table was given; measure one on the target machine with `bitscape latency build` and give it as "
    "--latency FILE, or search(..., latency=LatencyTable.load(FILE))"
)


@dataclass(frozen=True, kw_only=True)
class Cap:
    """How one kind of cost is made of integers per layer, and so how a cap on it becomes a limit."""

    layer_cost: Callable[[LayerCost, LayerBits], int]
    """Cost of one layer at given bits."""
    combine: Literal["sum", "max"]
    """How layers make the network's cost. A "max" kind forbids each layer the bits above the limit, by itself."""
    depends_on: frozenset[Literal["weight", "activation"]]
    """Which of a layer's two widths matter."""
    denominator: Callable[[NetworkProfile], int] = lambda network: 1
    """What the combined integer is divided by: a constant of the network, 1 unless the cost is a mean."""
    unit: Literal["", "bytes", "bits", "ms"] = ""
    """Unit of the cost."""
    measured: Literal["", "latency_ns", "flash_bytes", "sram_bytes"] = ""
    """Where `LayerCost` holds it, of a cost that is known only with a latency table."""

    def known(self, network: NetworkProfile) -> bool:
        """Whether it is known of the network."""
        return not self.measured or all(getattr(layer, self.measured) for layer in network.layers)

    def widths(self, network: NetworkProfile) -> frozenset[str]:
        """Which of a layer's two widths matter in the network: of a measured cost, those of which several were measured."""
        if not self.measured or not self.known(network):
            return frozenset(self.depends_on)
        pairs = [pair for layer in network.layers for pair in getattr(layer, self.measured)]
        return frozenset(width for width in self.depends_on if len({getattr(pair, width) for pair in pairs}) > 1)

    def combined(self, costs: Iterable[int]) -> int:
        """Combine the integers of the layers."""
        return sum(costs) if self.combine == "sum" else max(costs)

    def limit(self, network: NetworkProfile, budget: float) -> int:
        """Return the largest combined integer whose cost, as `value` reports it, is at most `budget`."""
        exact = floor(Fraction(budget) * self.denominator(network))
        # A mean may round to the budget from just above: reported as equal, it is within.
        return exact + 1 if self.value(network, exact + 1) <= budget else exact

    def value(self, network: NetworkProfile, combined: int) -> float:
        """Return the cost, in its unit, that the combined integer means; whole numbers stay exact integers."""
        denominator = self.denominator(network)
        return combined if denominator == 1 else combined / denominator


CAPS: dict[str, Cap] = {
    "bitops": Cap(layer_cost=layer_bitops, combine="sum", depends_on=frozenset({"weight", "activation"})),
    "weight_bytes": Cap(layer_cost=layer_weight_bytes, combine="sum", depends_on=frozenset({"weight"}), unit="bytes"),
    "mean_weight_bits": Cap(
        layer_cost=lambda layer, bits: layer.weights * bits.weight,
        combine="sum",
        depends_on=frozenset({"weight"}),
        denominator=lambda network: sum(layer.weights for layer in [*network.layers, *network.never_called]),
        unit="bits",
    ),
    "mean_activation_bits": Cap(
        layer_cost=lambda layer, bits: layer.input_elements * bits.activation,
        combine="sum",
        depends_on=frozenset({"activation"}),
        denominator=lambda network: sum(layer.input_elements for layer in network.layers),
        unit="bits",
    ),
    "peak_activation_bytes": Cap(
        layer_cost=layer_activation_bytes,
        combine="max",
        depends_on=frozenset({"activation"}),
        unit="bytes",
    ),
    "latency_ms": Cap(
        layer_cost=layer_latency_ns,
        combine="sum",
        depends_on=frozenset({"weight", "activation"}),
        denominator=lambda network: 10**6,
        unit="ms",
        measured="latency_ns",
    ),
    "flash_bytes": Cap(
        layer_cost=layer_flash_bytes,
        combine="sum",
        depends_on=frozenset({"weight"}),
        unit="bytes",
        measured="flash_bytes",
    ),
    "sram_bytes": Cap(
        layer_cost=layer_sram_bytes,
        combine="max",
        depends_on=frozenset({"weight", "activation"}),
        unit="bytes",
        measured="sram_bytes",
    ),
}
"""Every kind of cost, and of cap."""


def cap(kind: str) -> Cap:
    """Return the row of `CAPS`; an unknown kind is a BitscapeError with the nearest names."""
    if kind not in CAPS:
        raise BitscapeError(f"cost kind {kind!r} is unknown; kinds: {', '.join(CAPS)}{nearest(kind, CAPS)}")
    return CAPS[kind]


def layer_cost(kind: str, layer: LayerCost, bits: LayerBits) -> int:
    """Return the integer that `layer` adds to (or, for a "max" kind, must keep below) the limit of `kind`."""
    return cap(kind).layer_cost(layer, bits)


def limit(kind: str, network: NetworkProfile, budget: float) -> int:
    """Return the integer limit, in units of `layer_cost`, that an absolute `budget` of `kind` means."""
    return cap(kind).limit(network, budget)


def bitops(network: NetworkProfile, policy: Policy) -> int:
    """BitOps of one image."""
    return _combined("bitops", network, policy)


def weight_bytes(network: NetworkProfile, policy: Policy) -> int:
    """Bytes of all packed weights and their scales."""
    return _combined("weight_bytes", network, policy)


def mean_weight_bits(network: NetworkProfile, policy: Policy) -> float:
    """Weight bits, weighted by parameters."""
    return cost("mean_weight_bits", network, policy)


def mean_activation_bits(network: NetworkProfile, policy: Policy) -> float:
    """Activation bits, weighted by input elements."""
    return cost("mean_activation_bits", network, policy)


def peak_activation_bytes(network: NetworkProfile, policy: Policy) -> int:
    """Bytes of the largest input and output that are alive together."""
    return _combined("peak_activation_bytes", network, policy)


def cost(kind: str, network: NetworkProfile, policy: Policy) -> float:
    """Return the cost of one kind, in its own unit."""
    return cap(kind).value(network, _combined(kind, network, policy))


def policy_cost(network: NetworkProfile, policy: Policy) -> dict[str, float]:
    """Return every kind of cost of `policy` that is known: the keys are those of `CAPS`, without what no table was joined for."""
    return {kind: cost(kind, network, policy) for kind, row in CAPS.items() if row.known(network)}


def _combined(kind: str, network: NetworkProfile, policy: Policy) -> int:
    _check(network, policy.layers)
    row = cap(kind)
    stored = [layer for layer in network.never_called if layer.name in policy.layers]
    return row.combined(row.layer_cost(layer, policy.layers[layer.name]) for layer in [*network.layers, *stored])


def _check(network: NetworkProfile, bits: Mapping[str, LayerBits]) -> None:
    """Refuse unknown layers, missing bits, and one shared weight at two widths; never-called layers are optional."""
    for name in bits:
        if name not in network.by_name and name not in network.uncalled:
            hint = nearest(name, network.by_name)
            raise BitscapeError(f"policy names layer {name!r}, which the network does not have{hint}")
    for name in network.by_name:
        if name not in bits:
            raise BitscapeError(
                f"policy has no bits for layer {name!r}, and it must cover every layer{nearest(name, bits)}"
            )
    for group in network.tied:
        if len({bits[name].weight for name in group}) > 1:
            widths = ", ".join(f"{name} {bits[name].weight}" for name in group)
            raise BitscapeError(f"policy gives one shared weight several widths ({widths} bits); tie these layers")
