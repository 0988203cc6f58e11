import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from benchmarks.cards import FIELDS, Card, card_of, page, pages, sections
from bitscape.cli.parsing import training_steps
from bitscape.errors import BitscapeError
from bitscape.quant.quantizers import Quantizer
from bitscape.searches import fisher
from bitscape.searches.methods import METHODS

ROOT = Path(__file__).parents[2]

CARD = """Name: what it is.

Paper     Someone, 2020, arXiv 2001.01234
Idea      An idea that
          takes two lines.
Computes  a * b -> `a*b`
Departs   nothing
Costs     |x| < 3 passes
Measured  docs/results: here.
"""


def _module(name: str, text: str) -> ModuleType:
    return ModuleType(name, text)


def test_a_card_is_read_field_by_field():
    card = card_of(_module("bitscape.searches.name", CARD))
    assert card is not None
    assert (card.name, card.title, card.gist, card.source) == ("name", "Name", "what it is.", "src/bitscape/searches/name.py")
    assert card.fields["Idea"] == "An idea that takes two lines."
    assert tuple(card.fields) == FIELDS


def test_a_page_escapes_and_links():
    card = card_of(_module("bitscape.searches.name", CARD))
    assert card is not None
    text = page(card)
    assert "# Name\n\nWhat it is.\n" in text
    assert "[arXiv 2001.01234](https://arxiv.org/abs/2001.01234)" in text
    assert r"a \* b -> `a*b`" in text
    assert r"|x| \< 3 passes" in text
    assert "**Measured.** [results](../results.md): here." in text


def test_settings_are_shown_with_their_meaning():
    card = card_of(fisher)
    assert card is not None
    assert list(card.settings) == ["Fisher"]
    assert "| `images=256` | Proxy images scored, at least 1. |" in page(card)
    bare = Card("a", "a.py", "A", "b", {}, {"Kind": [["x=a|b", "one | two"]]})
    assert r"| `x=a\|b` | one \| two |" in page(bare)


LISTED = [*METHODS.values(), *training_steps().values(), *get_args(Quantizer)]


@pytest.mark.parametrize("kind", LISTED, ids=lambda kind: kind.__name__)
def test_a_page_shows_every_field_of_the_class_that_is_listed_and_no_other_class(kind: type):
    card = card_of(sys.modules[kind.__module__])
    assert card is not None
    settings = [field.name for field in fields(kind)]  # class variables are none
    expected = {kind.__name__: settings} if settings else {}
    assert {name: [re.split("[= ]", row[0])[0] for row in rows] for name, rows in card.settings.items()} == expected
    assert all(len(meaning) > 10 for rows in card.settings.values() for _, meaning in rows)
    assert all(f"## Settings of `{name}`\n\n| field=default | meaning |" in page(card) for name in expected)


def test_inherited_settings_are_on_the_page():
    text = pages()
    assert "| `centers=moving` |" in text["seam.md"] and "| `batch_size=64` |" in text["seam.md"]
    assert "| `case=3` |" in text["saq.md"] and "| `rho=0.003` |" in text["saq.md"]


def test_cards_name_pages_that_have_the_tables():
    named = [
        (card.name, document, re.findall(r"[a-z0-9-]+", names))
        for card in (*sections()["Search"], *sections()["Training steps"])
        for document, names in re.findall(r"docs/([a-z-]+): ([a-z0-9-]+(?:, [a-z0-9-]+)*)", card.fields["Measured"])
    ]
    assert ("topological", "transfer", ["transfer-scores"]) in named
    for name, document, tables in named:
        text = (ROOT / "docs" / f"{document}.md").read_text(encoding="utf-8")
        assert [table for table in tables if f"<!-- table: {table} -->" not in text] == [], name


def test_a_module_without_a_card_has_no_page():
    assert card_of(_module("helper", "Helps.\n\nPaper     Someone")) is None


def test_an_incomplete_card_is_refused():
    with pytest.raises(BitscapeError, match="helper: its card has the fields"):
        card_of(_module("helper", CARD.replace("Costs", "Price")))


def test_every_search_method_has_a_page():
    files = {kind.__module__.rpartition(".")[2] for kind in METHODS.values()}
    assert files == {card.name for card in sections()["Search"]}
    assert {f"{name}.md" for name in files} | {"index.md", "lsq.md", "rounding.md", "plain.md"} <= set(pages())
