"""What each layer of a network does for one image: MACs, weights, activations; and what no layer accounts for.

Only convolutions and linear layers are given bit-widths, so only they are counted as layers (by isinstance: float and
quantized networks give the same numbers). Everything else that holds parameters or multiplies matrices is listed under
`uncounted`.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from bitscape.calling import Inputs, shapes_of
from bitscape.cost.dry_pass import ModuleRun, dry_pass, is_shape
from bitscape.errors import BitscapeError
from bitscape.models.layers import KINDS, QUANTIZABLE, TRANSPOSED, has_weight, quantizable_layers, scale_axis, weight_shape
from bitscape.models.prepare import as_prepared
from bitscape.policy import LayerBits

_log = logging.getLogger("bitscape.cost")

NO_EFFECT = LayerBits(8, 8)
"""Bits of layers that the forward never calls: a policy must name them all the same."""
LOW_COVERAGE = 0.99
"""Below this share of MACs in counted layers, `measure` logs a warning."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One convolution or linear layer that runs; every count is for one image."""

    name: str
    """Name in the network."""
    kind: str
    """Name of a type of `models.layers.QUANTIZABLE`, for its subclasses too."""
    macs: int
    """Multiply-accumulates of its weight that ran, all calls together."""
    weights: int
    """Elements of the weight; 0 when another layer already counts the same parameter (see `tied_to`)."""
    weight_shape: tuple[int, ...]
    """Shape of the weight; (0,) of a product of two activations, of which nothing is stored."""
    scales: int
    """Scales stored with the weight, one per output channel (`models.layers.scale_axis`); 0 when tied."""
    input_elements: int
    """Elements of the input, of a product of two activations the first, in the largest call."""
    output_elements: int
    """Elements of the output, in the largest call."""
    calls: int = 1
    """Times the layer runs in one forward pass."""
    tied_to: str | None = None
    """The earlier layer that holds the same weight parameter, and counts it."""
    latency_ns: Mapping[LayerBits, int] = field(default_factory=dict, hash=False)
    """Predicted nanoseconds of a batch at each measured pair of bits; empty without a latency table (`latency.with_latency`)."""
    flash_bytes: Mapping[LayerBits, int] = field(default_factory=dict, hash=False)
    """Bytes of its weights as a compiler encodes them, at the same pairs; empty where the table knows none."""
    sram_bytes: Mapping[LayerBits, int] = field(default_factory=dict, hash=False)
    """Bytes of working memory in use while it runs, at the same pairs; empty where the table knows none."""


@dataclass(frozen=True, kw_only=True)
class Uncounted:
    """What one module holds or runs outside the counted layers' weights."""

    name: str
    """Name in the network; "(network)" for the network itself."""
    what: str
    """Kind of module, such as "BatchNorm2d", "Conv2d bias" or "Linear, never called"."""
    params: int
    """Parameters that no layer counts, such as norms, biases and embeddings."""
    macs: int
    """Multiply-accumulates of its own operations for one image, such as the products of attention."""


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """The layers of one network at one input shape."""

    layers: tuple[LayerCost, ...]
    """In order of first call."""
    never_called: tuple[LayerCost, ...] = ()
    """Layers that the forward pass never called as modules: bits given to them have no effect, but their weights are stored."""
    uncounted: tuple[Uncounted, ...] = ()
    """Parameters and MACs outside `layers`, per module."""
    input_shape: tuple[int, ...]
    """Shape of one image, without batch; of the first input where the network takes several."""
    heads: tuple[str, ...] = ()
    """Layers whose output reaches one of the network's without passing another layer, in call order."""

    @cached_property
    def by_name(self) -> dict[str, LayerCost]:
        """Layer name -> layer."""
        return {layer.name: layer for layer in self.layers}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shapes of all layers, never-called ones too: equal to `layer_shapes(model)`, as fingerprints need."""
        return {layer.name: layer.weight_shape for layer in (*self.layers, *self.never_called)}

    @property
    def uncalled(self) -> tuple[str, ...]:
        """Names of `never_called`."""
        return tuple(layer.name for layer in self.never_called)

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of the first layer called and of the heads; of the last one called where no head is known."""
        return tuple(dict.fromkeys([self.layers[0].name, *(self.heads or [self.layers[-1].name])]))

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of layers that share one weight parameter, and so must share their weight bits."""
        owners = dict.fromkeys(layer.tied_to for layer in self.layers if layer.tied_to is not None)
        return tuple((owner, *(layer.name for layer in self.layers if layer.tied_to == owner)) for owner in owners)

    @property
    def has_latency(self) -> bool:
        """Whether a latency table was joined."""
        return all(layer.latency_ns for layer in self.layers)

    @property
    def covered_macs(self) -> int:
        """MACs of `layers`."""
        return sum(layer.macs for layer in self.layers)

    @property
    def total_macs(self) -> int:
        """MACs of the whole network."""
        return self.covered_macs + sum(entry.macs for entry in self.uncounted)


def measure(model: nn.Module, sample: Inputs) -> NetworkProfile:
    """Count what every layer of `model` does for one sample: the shape of an image, such as (3, 224, 224), or inputs.

    Inputs are what `calling.call` takes, as a batch of one.

    A layer run several times counts its MACs each time and its weights once; a linear layer on (n, tokens, c) counts
    every token. The model is unchanged afterwards. Logs a warning when layers are never called, or when the layers
    cover less than 99 % of the MACs. Attention is counted as the four layers that `quantize` makes of it.
    Raises BitscapeError when the forward fails on that shape or runs no such layer, and for a layer that cannot take bits
    (a computed weight, a forward set on the instance).
    """
    if is_shape(sample):
        sample = shape = _checked_shape(sample)
    else:
        shape = tuple(shapes_of(sample)[0][1:])
    model = as_prepared(model)
    runs = dry_pass(model, sample)
    modules = quantizable_layers(model)
    layers = _layer_costs(modules, runs)
    if not layers:
        raise BitscapeError(
            f"model {type(model).__name__} runs no {KINDS} layer on input_shape={shape}, so there is "
            "nothing to give bits to"
        )
    called = {layer.name for layer in layers}
    idle = tuple(idle_layer(name, module) for name, module in modules.items() if name not in called)
    uncalled = tuple(layer.name for layer in idle)
    cost = NetworkProfile(
        layers=layers,
        never_called=idle,
        uncounted=_uncounted(model, {layer.name: layer for layer in layers}, uncalled, runs),
        input_shape=shape,
        heads=tuple(layer.name for layer in layers if runs[layer.name].is_head),
    )
    _warn_of_gaps(cost)
    return cost


def _checked_shape(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(input_shape)
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise BitscapeError(
            f"input_shape={input_shape!r} must be positive integers without the batch dimension, such as (3, 224, 224)"
        )
    return shape


def _layer_costs(modules: Mapping[str, nn.Module], runs: Mapping[str, ModuleRun]) -> tuple[LayerCost, ...]:
    owners: dict[int, str] = {}
    return tuple(_layer_cost(name, modules[name], run, owners) for name, run in runs.items() if name in modules)


def _layer_cost(name: str, module: nn.Module, run: ModuleRun, owners: dict[int, str]) -> LayerCost:
    weighted, shape = has_weight(module), weight_shape(module)
    owner = owners.setdefault(id(module.get_parameter("weight")), name) if weighted else name
    tied = owner != name
    return LayerCost(
        name=name,
        kind=_kind(module),
        macs=(run.weight_macs or _plain_macs(module, run)) if weighted else run.macs,
        weights=0 if tied else math.prod(shape),
        weight_shape=shape,
        scales=0 if tied else shape[scale_axis(module)],
        input_elements=run.input_elements,
        output_elements=run.output_elements,
        calls=run.calls,
        tied_to=owner if tied else None,
    )


def _plain_macs(module: nn.Module, run: ModuleRun) -> int:
    """Those of the plain layer, for a forward without convolution or matrix product.

    Each output element takes a filter or row of the weight; each input element of a transposed convolution a whole one.
    """
    elements = run.input_elements * run.calls if isinstance(module, TRANSPOSED) else run.total_output_elements
    return elements * math.prod(module.get_parameter("weight").shape[1:])


def idle_layer(name: str, module: nn.Module) -> LayerCost:
    """A layer that the forward pass never calls: it does nothing for an image, and its weight is stored."""
    shape = weight_shape(module)
    return LayerCost(
        name=name,
        kind=_kind(module),
        macs=0,
        weights=math.prod(shape),
        weight_shape=shape,
        scales=shape[scale_axis(module)],
        input_elements=0,
        output_elements=0,
        calls=0,
    )


def _kind(module: nn.Module) -> str:
    return next((kind.__name__ for kind in QUANTIZABLE if isinstance(module, kind)), type(module).__name__)


def _uncounted(
    model: nn.Module, layers: Mapping[str, LayerCost], uncalled: tuple[str, ...], runs: Mapping[str, ModuleRun]
) -> tuple[Uncounted, ...]:
    modules = dict(model.named_modules())
    counted = {id(modules[name].get_parameter("weight")) for name in layers if has_weight(modules[name])}
    found = []
    for name, module in modules.items():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in counted}
        counted |= {id(p) for p in own.values()}
        product = name in layers and not has_weight(module)
        macs = runs[name].macs - runs[name].counted_macs if name in runs and not product else 0
        if (own or macs) and not _is_quantizer(name, layers):
            what = _what(module, tuple(own), name in layers, name in uncalled)
            params = sum(p.numel() for p in own.values())
            found.append(Uncounted(name=name or "(network)", what=what, params=params, macs=macs))
    return tuple(found)


def _is_quantizer(name: str, layers: Mapping[str, LayerCost]) -> bool:
    """Whether the module is a quantizer of a counted layer: its scales are stored, and counted, with the weight."""
    parts = name.split(".")
    quantizers = [depth for depth, part in enumerate(parts) if part in ("weight_quantizer", "input_quantizer")]
    return any(".".join(parts[:depth]) in layers for depth in quantizers)


def _what(module: nn.Module, parameters: tuple[str, ...], counted: bool, uncalled: bool) -> str:
    if counted:
        return f"{_kind(module)} {', '.join(parameters) or 'extra operations'}"
    return f"{_kind(module)}, never called" if uncalled else _kind(module)


def _warn_of_gaps(cost: NetworkProfile) -> None:
    if cost.uncalled:
        _log.warning(
            "the forward pass never calls these layers, their bits have no effect: %s", ", ".join(cost.uncalled)
        )
    if cost.covered_macs < LOW_COVERAGE * cost.total_macs:
        largest = sorted(cost.uncounted, key=lambda entry: -entry.macs)[:3]
        names = ", ".join(f"{entry.name} ({entry.what}, {entry.macs / 1e6:.4g} M)" for entry in largest if entry.macs)
        percent = 100 * cost.covered_macs / cost.total_macs
        _log.warning("layers cover %.1f %% of the MACs; the rest is not in BitOps, most of it in %s", percent, names)
