"""The tutorial runs as it is printed, and what it shows of each output is what the command prints, numbers aside.

It trains on fewer digits than there are, since the numbers are put aside.
"""

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.run import succeed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_digits")]

TUTORIAL = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^<!-- run(?:: (\w+))? -->\n```(\w*)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"\d[\d.,]*(e-?\d+)?")


@dataclass(frozen=True)
class Command:
    needs: str
    arguments: tuple[str, ...]
    shown: tuple[str, ...]


def _commands() -> list[Command]:
    found = []
    for needs, language, text in BLOCK.findall(TUTORIAL):
        for part in () if language else re.split(r"^\$ ", text, flags=re.M)[1:]:
            line, _, shown = part.replace("\\\n", " ").partition("\n")
            program, *arguments = shlex.split(line)
            assert program == "bitscape"
            lines = [_plain(each) for each in shown.splitlines()]
            found.append(Command(needs, tuple(arguments), tuple(each for each in lines if each not in ("", "..."))))
    return found


def _plain(line: str) -> str:
    return " ".join(NUMBER.sub("N", line).split())


def test_every_shell_block_of_the_tutorial_is_run():
    blocks = re.findall(r"^```\n(.*?)^```$", TUTORIAL, re.M | re.S)
    assert sum(block.count("$ bitscape ") for block in blocks) == len(_commands()) > 10


def test_the_commands_print_what_the_tutorial_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    left_out = []
    for command in _commands():
        if command.needs and importlib.util.find_spec(command.needs) is None:
            left_out.append(f"{' '.join(command.arguments[:2])} needs {command.needs}")
            continue
        printed = {_plain(line) for line in succeed(*command.arguments).out.splitlines()}
        assert [line for line in command.shown if line not in printed] == [], " ".join(command.arguments)
    for name in ("mixed", "uniform"):
        assert (tmp_path / name / "model.safetensors").is_file()
    assert (tmp_path / "mixed.safetensors").stat().st_size < (tmp_path / "float" / "model.safetensors").stat().st_size / 4
    if left_out:
        pytest.skip("; ".join(left_out))


def test_the_python_of_the_tutorial_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (code,) = (text for kind, language, text in BLOCK.findall(TUTORIAL) if language == "python" and not kind)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "docs/tutorial.md", "exec"), {})
    shown = re.search(r"It prints\n\n```\n(.*?)```", TUTORIAL, re.S)
    assert shown
    assert _plain(capsys.readouterr().out) == _plain(shown[1])
    assert {path.name for path in tmp_path.iterdir()} == {"mixed.safetensors", "uniform.safetensors"}


def test_data_and_aims_of_ones_own_are_trained_as_the_tutorial_says():
    (code,) = (text for kind, _, text in BLOCK.findall(TUTORIAL) if kind == "own")
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(code, "docs/tutorial.md", "exec"), names)
    outputs, (_, _, distances) = names["network"](names["left"], names["right"]), names["rows"].tensors
    assert float((outputs - distances).abs().mean().detach()) < 0.5 * float(distances.abs().mean())
