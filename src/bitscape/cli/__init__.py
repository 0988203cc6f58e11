"""The command line; `bitscape --help` lists the commands.

Modules here import torch, and what imports it, inside functions: `bitscape search --help` takes milliseconds.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # of typing, whose import takes long enough to be met by Ctrl-C
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

INTERRUPTED = "interrupted: no result was written; run the command again"


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and leave the process with its exit code: 0, 2 for an error, 130 after Ctrl-C, 143 after SIGTERM."""
    try:
        from bitscape.cli.app import run  # within the block: Ctrl-C may come while this is imported

        code = run(args)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        code = 130
    sys.exit(code)


__all__ = ["main"]
