"""The command line, in this process."""

import contextlib
import io
from dataclasses import dataclass

import pytest

from bitscape.cli import main

MODEL = ("--model", "bitscape.models.digits:digits_net")


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
