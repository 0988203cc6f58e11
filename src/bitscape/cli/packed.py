"""Packed files with their norms folded or not, and the note in them that tells which."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitscape.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor, nn

_FOLDED = {"norms": "folded"}


def with_note(policy: Policy, *, folded: bool) -> Policy:
    """Note in a policy's provenance that norms were folded before the network was quantized, if they were."""
    return replace(policy, provenance={**policy.provenance, **_FOLDED}) if folded else policy


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
    from bitscape.exporters.agreement import require_equal

    require_equal(saved, loaded, images, path)
    report_same(len(images))


def report_same(images: int) -> None:
    """Print that a packed file gives the same bits."""
    click.echo(f"read back: outputs on {images} images are the same, bit for bit")


def packed_policy(path: Path) -> Policy:
    """Read the policy in the header of a packed file."""
    from bitscape.exporters.packed.file import read_header

    return read_header(path).policy
