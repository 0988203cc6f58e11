"""Packed files with their norms folded or not, and the note in them that tells which."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.errors import BitscapeError
from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitscape.exporters.packed.file import PackedInfo

_FOLDED = {"norms": "folded"}


def save_packed_network(network: "nn.Module", path: Path, policy: Policy, *, folded: bool) -> "PackedInfo":
    """Write a packed file; whether norms were folded goes into its policy's provenance."""
    from bitscape.exporters.packed.file import save_packed

    noted = replace(policy, provenance={**policy.provenance, **_FOLDED}) if folded else policy
    return save_packed(network, path, policy=noted)


def load_packed_network(path: Path, network: "nn.Module", shape: tuple[int, ...]) -> tuple["nn.Module", Policy]:
    """Return the network of a packed file and its policy; norms of the float `network` are folded if they were."""
    from bitscape.cli.network import folded
    from bitscape.engine.forward import device_of
    from bitscape.exporters.packed.file import load_packed

    policy = packed_policy(path)
    if _FOLDED.items() <= policy.provenance.items():
        network = folded(network, shape, device_of(network))
    return load_packed(path, network), policy


def check_same_outputs(saved: "nn.Module", loaded: "nn.Module", images: "Tensor", path: Path) -> None:
    """Raise BitscapeError unless both networks give the same bits on images."""
    import torch

    from bitscape.models.modes import evaluating

    with evaluating(saved), evaluating(loaded):
        same = torch.equal(saved(images), loaded(images))
    if not same:
        raise BitscapeError(
            f"{path}: read back, its outputs differ from the network's that was saved; "
            "the file is not kept"
        )
    click.echo(f"read back: outputs on {len(images)} images are the same, bit for bit")


def packed_policy(path: Path) -> Policy:
    """Read the policy in the header of a packed file."""
    from bitscape.exporters.packed.file import read_header

    return read_header(path).policy
