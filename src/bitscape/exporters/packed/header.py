"""The JSON object in a packed file's header: policy, layers, and a description as compressed-tensors writes it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitscape.errors import BitscapeError, prefixed
from bitscape.files import UNSEALED, parse_json
from bitscape.policy import Policy
from bitscape.quant.quantizers.base import FakeQuantizer
from bitscape.quant.quantizers.dorefa import ClippedActivation
from bitscape.quant.quantizers.lsq import LsqActivation
from bitscape.quant.quantizers.lsq_plus import LsqPlusActivation
from bitscape.quant.quantizers.pact import PactActivation
from bitscape.version import __version__

FORMAT = 1
_INPUT_QUANTIZERS: dict[str, type[FakeQuantizer]] = {
    "lsq": LsqActivation,
    "lsq_plus": LsqPlusActivation,
    "pact": PactActivation,
    "clipped": ClippedActivation,
}


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """What the header says of one layer."""

    zero_point: float
    """Of the weight's grid: 0, or -1/2 (mid-rise)."""
    scales: str
    """"channel" or "tensor"."""
    input: Mapping[str, Any]
    """Kind of the input quantizer, and its settings."""
    second: Mapping[str, Any] | None = None
    """The same of the second operand, of a product of two activations; None of a layer with a weight."""
    same_weight_as: str | None = None
    """The layer whose codes this one shares (tied weights)."""

    def __post_init__(self) -> None:
        if type(self.zero_point) not in (int, float) or self.zero_point not in (0, -0.5):
            raise BitscapeError(f"zero_point is {self.zero_point!r}; allowed are 0 and -0.5")
        if self.scales not in ("channel", "tensor"):
            raise BitscapeError(f"scales is {self.scales!r}; allowed are 'channel' and 'tensor'")
        _check_input("input", self.input)
        if self.second is not None:
            _check_input("second", self.second)

    def owner(self, name: str) -> str:
        """Name of the layer that holds the codes of the layer `name`."""
        return name if self.same_weight_as is None else self.same_weight_as

    def input_quantizer(self, bits: int) -> FakeQuantizer:
        """Build the input quantizer; its state is not set."""
        return _built(self.input, bits)

    def second_quantizer(self, bits: int) -> FakeQuantizer:
        """Build the quantizer of a product's second operand; its state is not set."""
        assert self.second is not None
        return _built(self.second, bits)


def _built(description: Mapping[str, Any], bits: int) -> FakeQuantizer:
    settings = dict(description)
    return _INPUT_QUANTIZERS[settings.pop("kind")](bits, **settings)


def _check_input(what: str, description: object) -> None:
    if not isinstance(description, Mapping) or description.get("kind") not in tuple(_INPUT_QUANTIZERS):
        raise BitscapeError(f"{what} is {description!r}; it must be an object whose 'kind' is {', '.join(_INPUT_QUANTIZERS)}")
    for name, value in description.items():
        if name != "kind" and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise BitscapeError(f"{what}: {name} is {value!r}; allowed are numbers from 0")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a packed file says of the network."""

    policy: Policy
    """Bits of every layer."""
    layers: Mapping[str, StoredLayer]
    """Layer name -> how it is stored."""

    def to_json(self) -> str:
        """Write the header's text."""
        layers = {
            name: {key: value for key, value in dataclasses.asdict(layer).items() if value is not None}
            for name, layer in self.layers.items()
        }
        document = {
            "format": FORMAT,
            "checksum": UNSEALED,  # of the file; it is not known yet
            "tool": f"bitscape {__version__}",
            "policy": dataclasses.asdict(self.policy),
            "layers": layers,
            "quantization_config": quantization_config(self),
        }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Header":
        """Read the header's text. Raises BitscapeError for another format or anything damaged."""
        try:
            return _from_document(parse_json(text.encode()))
        except BitscapeError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            what = f"{type(error).__name__}: {error}"
            raise BitscapeError(f"the header is damaged ({what}); write the file anew") from error


def describe_input(quantizer: nn.Module) -> dict[str, Any]:
    """Kind and settings of an input quantizer. Raises BitscapeError for one that a file cannot describe."""
    for kind, known in _INPUT_QUANTIZERS.items():
        if type(quantizer) is known and not isinstance(quantizer.bits, Tensor):
            return {"kind": kind} | ({"decay": quantizer.decay} if isinstance(quantizer, PactActivation) else {})
    raise BitscapeError(
        f"no packed file holds this input quantizer ({type(quantizer).__name__}); quantize the network with one of "
        "bitscape's quantizers and a static policy, and save it outside of `bypassed`"
    )


def quantization_config(header: Header) -> dict[str, Any]:
    """Describe the weights as compressed-tensors does: one group of layers for each way of storing them."""
    groups: dict[tuple[int, str, float], list[str]] = {}
    weighted = {name: layer for name, layer in header.layers.items() if layer.second is None}
    for name, layer in weighted.items():
        groups.setdefault((header.policy.layers[name].weight, layer.scales, layer.zero_point), []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": groups[key], "weights": _weight_arguments(*key)} for index, key in enumerate(sorted(groups))
        },
    }


def _weight_arguments(bits: int, scales: str, zero_point: float) -> dict[str, Any]:
    arguments = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": scales, "dynamic": False}
    # The convention has no half zero points: an argument that it does not know is safer than one taken for 0.
    return arguments | ({"zero_point": zero_point} if zero_point else {})


def _stored(name: str, entry: Any) -> StoredLayer:
    with prefixed(f"layer {name!r}"):
        return StoredLayer(**entry)


def _from_document(document: Any) -> Header:
    if document["format"] != FORMAT:
        raise BitscapeError(
            f"packed format {document['format']!r} is unknown; this version reads format {FORMAT}; install the version "
            "that wrote it, or write the file anew"
        )
    policy = Policy.from_document({"format": FORMAT, **document["policy"]})
    layers = {name: _stored(name, entry) for name, entry in dict(document["layers"]).items()}
    for name in dict.fromkeys([*(name for name, bits in policy.layers.items() if not bits.is_float), *layers]):
        layers[name].input_quantizer(policy.layers[name].activation)
        if layers[layers[name].owner(name)].same_weight_as is not None:
            raise ValueError(f"the weight of {name} is stored nowhere")
    return Header(policy=policy, layers=layers)
