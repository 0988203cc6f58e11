"""The command line; `bitscape --help` lists the commands.

Modules here import torch, and what imports it, inside functions: `bitscape search --help` takes milliseconds.
"""

from bitscape.cli.app import main

__all__ = ["main"]
