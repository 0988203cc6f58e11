"""The command line, in this process, and a network and a policy for it."""

import contextlib
import io
from dataclasses import dataclass

import pytest

from bitscape.cli import main
from bitscape.models.digits import digits_net
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, fingerprint

MODEL = ("--model", "bitscape.models.digits:digits_net")
SHAPES = layer_shapes(digits_net())
ENDS = ("stem.0", "head")
MIXED = Policy(
    {name: LayerBits(8, 8) if name in ENDS else LayerBits(2 + row % 5, 4) for row, name in enumerate(SHAPES)},
    fingerprint(SHAPES),
    cost={"bitops": 3_000_000},
    provenance={"method": "fisher", "images": [32, 1, 8, 8]},
)
"""Six layers of 2 to 6 weight bits between two ends at 8."""


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str


def run_cli(*args: object) -> Shown:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main([str(arg) for arg in args])
    assert isinstance(left.value.code, int)
    return Shown(left.value.code, out.getvalue(), err.getvalue())


def succeed(*args: object) -> Shown:
    shown = run_cli(*args)
    assert shown.code == 0, shown.err
    return shown
