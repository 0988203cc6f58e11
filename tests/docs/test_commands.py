"""Command lines in the documents: every command and option exists, and closed lists of values hold the value. Nothing is run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bitscape.cli.app import commands
from bitscape.errors import BitscapeError
from bitscape.searches.methods import METHODS
from bitscape.steps import STEPS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`]+)`")
LISTED = {"--method": set(METHODS), "--step": {*STEPS, "dqmq"}}
"""Options that take names from our own lists."""


def command_lines(text: str) -> Iterator[str]:
    """What stands behind `bitscape` in shell blocks and in inline code, to the end of the line or of its comment."""
    for block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"\s*(?:\$ )?(?:torchrun .*? )?bitscape (.*)", line):
                yield found[1].partition("    #")[0]
    for inline in INLINE.findall(" ".join(FENCED.sub("", text).split())):
        if found := re.match(r"(?:torchrun .*? )?bitscape (.*)", inline):
            yield found[1]


def check(line: str) -> None:
    """Raise BitscapeError for an option, value or command that does not exist; `...` and words in capitals stand for anything."""
    command: click.Command = commands
    words = iter(word for word in shlex.split(line) if word != "...")
    for word in words:
        name, _, given = word.partition("=")
        if name == "--help" or word.isupper():
            continue
        if not name.startswith("-"):
            if isinstance(command, click.Group):
                if name not in command.commands:
                    raise BitscapeError(f"bitscape {line}: no command {name!r}")
                command = command.commands[name]
            continue
        options = {form: each for each in command.params for form in (*each.opts, *each.secondary_opts)}
        if name not in options:
            raise BitscapeError(f"bitscape {line}: {command.name} has no option {name!r}")
        option = options[name]
        if isinstance(option, click.Option) and not option.is_flag:
            _check_value(line, option, given or next(words, "..."))


def _check_value(line: str, option: click.Option, value: str) -> None:
    allowed = set(option.type.choices) if isinstance(option.type, click.Choice) else LISTED.get(option.opts[0], {value})
    if value not in allowed and not value.isupper():
        raise BitscapeError(f"bitscape {line}: {option.opts[0]} has no value {value!r}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_command_lines_parse(document: Path):
    for line in command_lines(document.read_text(encoding="utf-8")):
        check(line)


def test_command_lines_are_found():
    text = (
        "Say `bitscape policy show FILE` or `torchrun -n 2 bitscape search`.\n```\n$ bitscape train --lr 1 \\\n  --out a    # so\nx\n```\n"
    )
    assert [" ".join(line.split()) for line in command_lines(text)] == ["train --lr 1 --out a", "policy show FILE", "search"]
    assert sum(len(list(command_lines(path.read_text(encoding="utf-8")))) for path in DOCUMENTS) > 40


@pytest.mark.parametrize(
    "line", ["sarch", "search --bugdet bitops=w4a4", "bench --runtime tensorrt", "search --method fishr", "--out x", "policy shw"]
)
def test_what_does_not_exist_is_found(line: str):
    with pytest.raises(BitscapeError, match="no "):
        check(line)
