"""Packed files: the policy in their header, and the line that says that one was read back."""

from pathlib import Path

import click

from bitscape.policy import Policy


def report_same(images: int) -> None:
    """Print that a packed file gives the same bits."""
    click.echo(f"read back: outputs on {images} images are the same, bit for bit")


def packed_policy(path: Path) -> Policy:
    """Read the policy in the header of a packed file."""
    from bitscape.exporters.packed.file import read_header

    return read_header(path).policy
