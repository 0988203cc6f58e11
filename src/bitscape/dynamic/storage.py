"""Networks whose bits depend on the image as folders: JSON and safetensors, nothing pickled.

A dynamic network is `dynamic.json`, `policy.json` and `model.safetensors`. Tiers are `tiers.json`, `gate.safetensors`, and for each tier a
folder `tier1`, `tier2`, ... as `bitscape train` leaves it for a static network. Folders hold no float network: that comes from its code.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

from pydantic import ConfigDict, with_config
from torch import nn

from bitscape.cost.layers import NetworkProfile, measure
from bitscape.cost.policy_cost import policy_cost
from bitscape.dynamic.build import unset_network
from bitscape.dynamic.network import DynamicBits, DynamicNetwork
from bitscape.dynamic.tiers import Gate, TieredNetwork
from bitscape.errors import BitscapeError, prefixed
from bitscape.files import write_atomic
from bitscape.folders import DYNAMIC_FILE, GATE_FILE, POLICY_FILE, TIERS_FILE, WEIGHTS_FILE
from bitscape.models.find import load_weights, save_weights
from bitscape.policy import Policy
from bitscape.quant.convert import with_quantizers
from bitscape.quant.quantizers import FakeQuantizer
from bitscape.quant.quantizers.lsq import LsqActivation, LsqWeight
from bitscape.quant.storage import load_static, save_static, static_policy
from bitscape.schema import Document, read_document

FORMAT: Final = 1
_STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class DynamicDocument:
    """`dynamic.json`."""

    format: Literal[1]
    """Of this file."""
    low: int
    """Least width."""
    high: int
    """Largest width."""
    weights: bool
    """Whether images decide the bits of weights too."""
    static: tuple[str, ...] | None
    """Layers that keep the bits of `policy.json`; null: the first and the last."""
    input_shape: tuple[int, ...]
    """Of one image."""


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class TierSummary:
    """What one tier costs; the gate is not in it."""

    bitops: int
    """BitOps of an image."""
    mean_weight_bits: float
    """Weighted by weights."""
    mean_activation_bits: float
    """Weighted by input elements."""
    share: float
    """Of the images that the tiers were made from, 0 to 1."""


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class TiersDocument:
    """`tiers.json`."""

    format: Literal[1]
    """Of this file."""
    input_shape: tuple[int, ...]
    """Of one image."""
    gate_bitops: float
    """BitOps of choosing among the tiers, for one image."""
    tiers: tuple[TierSummary, ...]
    """The cheapest first: `tier1`."""


def save_dynamic(network: DynamicNetwork, folder: Path) -> None:
    """Write a dynamic network into `folder`, which is made; of layers that images decide about, `policy.json` has the largest width.

    Raises BitscapeError for other quantizers than LSQ, which the folder does not name.
    """
    _check_quantizers(network)
    folder.mkdir(parents=True, exist_ok=True)
    bits = network.bits
    document = DynamicDocument(
        format=FORMAT,
        low=bits.low,
        high=bits.high,
        weights=bits.weights,
        static=bits.static,
        input_shape=tuple(network.cost.input_shape),
    )
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)  # never beside a document of another network
    _write(document, folder / DYNAMIC_FILE)
    save_static(network.state_dict(), network.policy(network.level(bits.high, 1)), folder)


def _check_quantizers(network: DynamicNetwork) -> None:
    for module in network.modules():
        if isinstance(module, FakeQuantizer) and not isinstance(module, LsqWeight | LsqActivation):
            raise BitscapeError(
                f"network: quantized by {type(module).__name__}; folders hold LSQ only: keep its state dict, for unset_network"
            )


def load_dynamic(model: nn.Module, folder: Path) -> DynamicNetwork:
    """Return the dynamic network of a folder in eval mode, on the device of the float network `model`, whose code it needs.

    Raises:
        BitscapeError: a missing or damaged file, another format, or another network.
    """
    about = read_dynamic(folder)
    with prefixed(folder / DYNAMIC_FILE):
        bits = DynamicBits(low=about.low, high=about.high, weights=about.weights, static=about.static)
    _check_there(folder)
    policy = Policy.load(folder / POLICY_FILE)
    with prefixed(folder):
        network = unset_network(model, policy, about.input_shape, bits)
    load_weights(network, folder / WEIGHTS_FILE)
    return network.eval()


def save_tiers(tiers: TieredNetwork, folder: Path, *, shares: Sequence[float]) -> None:
    """Write tiers into `folder`, which is made.

    Args:
        tiers: what `distill_tiers` returned.
        folder: where they go.
        shares: of the images that go to each tier, 0 to 1.
    """
    cost = tiers.cost
    document = TiersDocument(
        format=FORMAT,
        input_shape=tuple(cost.input_shape),
        gate_bitops=tiers.gate_bitops,
        tiers=tuple(_summary(cost, policy, share) for policy, share in zip(tiers.policies, shares, strict=True)),
    )
    source = {"images": [1, *cost.input_shape]}
    (folder / TIERS_FILE).unlink(missing_ok=True)  # last again: without it a folder counts as unfinished
    for at, (network, policy) in enumerate(zip(tiers.networks, tiers.policies, strict=True)):
        own = tier_folder(folder, at)
        own.mkdir(parents=True, exist_ok=True)
        noted = replace(policy, cost=policy_cost(cost, policy), provenance={**policy.provenance, **source})
        save_static(network.state_dict(), noted, own)
    save_weights(tiers.gate.state_dict(), folder / GATE_FILE)
    _write(document, folder / TIERS_FILE)


def load_tiers(model: nn.Module, folder: Path) -> TieredNetwork:
    """Return the tiers of a folder in eval mode, on the device of the float network `model`, whose code they need.

    Raises:
        BitscapeError: a missing or damaged file, another format, or another network.
    """
    about = read_tiers(folder)
    folders = [tier_folder(folder, at) for at in range(len(about.tiers))]
    for own in folders:
        _check_there(own)
    policies = [Policy.load(own / POLICY_FILE) for own in folders]
    networks = []
    for own, policy in zip(folders, policies, strict=True):
        with prefixed(own / POLICY_FILE):
            networks.append(with_quantizers(model, policy))
    gate = Gate(len(folders))
    for made, file in [*zip(networks, [own / WEIGHTS_FILE for own in folders], strict=True), (gate, folder / GATE_FILE)]:
        load_weights(made, file)
    with prefixed(folder / TIERS_FILE):
        cost = measure(model, about.input_shape)
    return TieredNetwork(networks, policies, gate, cost).to(next(model.parameters()).device).eval()


def read_dynamic(folder: Path) -> DynamicDocument:
    """Read `dynamic.json` of a folder. Raises BitscapeError for a missing or damaged file and another format."""
    return _read(DynamicDocument, folder / DYNAMIC_FILE)


def read_tiers(folder: Path) -> TiersDocument:
    """Read `tiers.json` of a folder. Raises BitscapeError for a missing or damaged file and another format."""
    return _read(TiersDocument, folder / TIERS_FILE)


def tier_folder(folder: Path, at: int) -> Path:
    """Where the tier `at`, from 0, is kept: `tier1` is the first."""
    return folder / f"tier{at + 1}"


def _summary(cost: NetworkProfile, policy: Policy, share: float) -> TierSummary:
    costs = policy_cost(cost, policy)
    means = {kind: costs[kind] for kind in ("mean_weight_bits", "mean_activation_bits")}
    return TierSummary(bitops=int(costs["bitops"]), share=share, **means)


def _check_there(folder: Path) -> None:
    for name in (POLICY_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise BitscapeError(f"{folder}: no {name}; the folder is not complete, write it again")


def _write(document: DynamicDocument | TiersDocument, path: Path) -> None:
    write_atomic(path, json.dumps(asdict(document), indent=2) + "\n")


def _read(kind: type[Document], path: Path) -> Document:
    if not path.is_file():
        raise BitscapeError(f"{path.parent}: no {path.name}; give a folder that holds one")
    return read_document(kind, path, format=FORMAT)


def load_folder(
    model: nn.Module, folder: Path, shape: tuple[int, ...]
) -> tuple[nn.Module, Policy | None]:
    """Return the network of a folder, static, dynamic or tiers; only static ones have a policy.

    The costs of the others are those of images of one shape: BitscapeError for another `shape`.
    """
    if (folder / DYNAMIC_FILE).is_file():
        _check_shape(folder, read_dynamic(folder).input_shape, shape)
        return load_dynamic(model, folder), None
    if (folder / TIERS_FILE).is_file():
        _check_shape(folder, read_tiers(folder).input_shape, shape)
        return load_tiers(model, folder), None
    return load_static(model, folder)


def folder_policy(folder: Path) -> Policy | None:
    """Return the policy of a folder that `load_folder` takes, None of one without; no network is needed."""
    decides = any((folder / name).is_file() for name in (DYNAMIC_FILE, TIERS_FILE))
    return None if decides else static_policy(folder)


def _check_shape(folder: Path, made_for: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if made_for != shape:
        expected, actual = ("x".join(map(str, sizes)) for sizes in (made_for, shape))
        raise BitscapeError(
            f"{folder} was made for images of {expected}, --data has {actual}; choose the data or "
            "--input-size to match"
        )
