from pathlib import Path

import bitscape as bs
from tools.site import methods_nav, outward

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_links_that_leave_the_pages_lead_into_the_repository():
    text = "[a](../../src/bitscape/policy.py) [b](../results.md#speed) [c](https://x.org/a) [d](#here) [e](../../README.md#start)"
    expected = "[a](R/src/bitscape/policy.py) [b](../results.md#speed) [c](https://x.org/a) [d](#here) [e](R/README.md#start)"
    assert outward(text, DOCS / "methods" / "saq.md", DOCS, "R") == expected


def test_every_method_is_in_the_navigation():
    first, *sections = methods_nav((DOCS / "methods" / "index.md").read_text(encoding="utf-8"))
    assert first == "methods/index.md"
    listed = [path for section in sections for paths in section.values() for path in paths]
    assert sorted([first, *listed]) == sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / "methods").glob("*.md"))


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    assert [name for name in bs.__all__ if name != "__version__" and f"::: bitscape.{name}\n" not in text] == []
