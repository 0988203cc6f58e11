"""Messages that the documentation quotes are messages of the source: each matches one, names and numbers aside."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [line for block in re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
PLACE = re.compile(r"%[-+ #0-9.*]*[sdgrf%]")
FIXED = 20
"""Letters that a pattern must have besides its places, so that it says which message it is."""


def _pattern(node: ast.expr) -> tuple[str, int] | None:
    """A regular expression of a text in the source, and how many letters of it are fixed; None for what is no text."""
    if isinstance(node, ast.JoinedStr):
        fixed = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        fixed = [part for piece in PLACE.split(node.value) for part in (None, piece)][1:]
    else:
        return None
    return "".join(".+" if part is None else re.escape(str(part)) for part in fixed), sum(len(str(part or "")) for part in fixed)


def _patterns() -> list[re.Pattern[str]]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "src").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return [re.compile(found[0], re.S) for node in nodes if (found := _pattern(node)) and found[1] >= FIXED]


@pytest.fixture(scope="module")
def patterns() -> list[re.Pattern[str]]:
    return _patterns()


@pytest.mark.parametrize("message", QUOTED, ids=lambda text: text[:40])
def test_a_quoted_message_is_one_of_the_source(message: str, patterns: list[re.Pattern[str]]):
    assert any(pattern.fullmatch(message) for pattern in patterns)


def test_a_changed_message_is_found(patterns: list[re.Pattern[str]]):
    changed = QUOTED[0].replace("no policy fits", "nothing fits")
    assert changed != QUOTED[0]
    assert not any(pattern.fullmatch(changed) for pattern in patterns)


def test_every_entry_says_what_to_do_or_what_it_comes_from():
    entries = re.split(r"^### ", PAGE, flags=re.M)[1:]
    assert len(entries) > 15
    assert [entry.splitlines()[0] for entry in entries if "**Do.**" not in entry and "**Cause.**" not in entry] == []
