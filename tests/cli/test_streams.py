import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitscape.cli.streams import outlived_streams
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from tests.cli.run import MODEL, run_cli

pytestmark = pytest.mark.slow

SEARCH = (*MODEL, "--data", "digits", "--method", "uniform", "--images", 8, "--budget", "bitops=w4a4")
RUN = "from bitscape.cli import main; main()"


class Refusing(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.refusal = error

    def write(self, text: str) -> int:
        raise self.refusal


def test_a_reader_that_left_costs_no_result(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, "search", *map(str, SEARCH), "--out", str(tmp_path / "p.json")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert Policy.load(tmp_path / "p.json").layers["block1.conv1"] == LayerBits(4, 4)


def test_a_full_output_is_an_error_after_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Refusing(OSError(errno.ENOSPC, "No space left on device")))
    done = []
    with pytest.raises(BitscapeError, match="standard output: No space left on device; files"), outlived_streams():
        print("first")
        print("second")
        done.append("work")
    assert done == ["work"]


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Refusing(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    with outlived_streams():
        print("text")
        print("text", file=sys.stderr)


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_that_was_never_open_is_no_error(closed: str, tmp_path: Path) -> None:
    Policy({"conv1": LayerBits(4, 8)}).save(tmp_path / "p.json")
    command = f'exec "$0" -c "{RUN}" policy show p.json {closed}>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_come_before_the_output(cli, tmp_path, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("bitscape.cli.search.print_layers", refuse)
    assert run_cli("search", *SEARCH, "--out", tmp_path / "p.json").code == 2
    assert json.loads((tmp_path / "p.json").read_text())["layers"]["block1.conv1"] == {"weight": 4, "activation": 4}
