"""Pages of docs/methods, made from the method cards: the docstrings that open the method files."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import get_args

from bitscape.cli.methods import settings_of
from bitscape.cli.parsing import training_steps
from bitscape.errors import BitscapeError
from bitscape.quant.quantizers import Quantizer
from bitscape.searches.methods import METHODS

SECTIONS = {
    "Search": "bitscape.searches",
    "Training steps": "bitscape.steps",
    "Bits for each image": "bitscape.dynamic",
    "Quantizers": "bitscape.quant.quantizers",
    "Repair without training": "bitscape.quant.repair",
    "Tuning without labels": "bitscape.tuning",
}
"""Heading -> the package whose modules may carry a card."""
FIELDS = ("Paper", "Idea", "Computes", "Departs", "Costs", "Measured")
PAGES = ("results-searches", "results-flat-training", "results-dynamic", "results", "transfer")
"""NAME of docs/NAME in a card, which a page of docs/methods links to; a longer name before its beginning."""
MARK = "<!-- Written by `python -m benchmarks.tables`"
_FIELD = re.compile(rf"({'|'.join(FIELDS)}) {{2,}}(\S.*)")
_CODE = re.compile(r"(`[^`]*`)")


@dataclass(frozen=True)
class Card:
    """A method card."""

    name: str
    """The module's last name, and the page's."""
    source: str
    """The file, from the root of the repository."""
    title: str
    """What the method is called: the first line up to its colon."""
    gist: str
    """What it is: the first line after the colon."""
    fields: dict[str, str]
    """Field -> its text on one line."""
    settings: dict[str, list[list[str]]]
    """Class -> its settings, each [field=default, meaning]."""


def sections() -> dict[str, list[Card]]:
    """Every card there is, under its heading, by name."""
    found = {heading: list(_cards_in(package)) for heading, package in SECTIONS.items()}
    names = [card.name for cards in found.values() for card in cards]
    for name in names:
        if names.count(name) > 1:
            raise BitscapeError(f"two method files are called {name}; their pages would replace each other, rename one")
    return found


def pages() -> dict[str, str]:
    """File name in docs/methods -> its text."""
    found = sections()
    return {"index.md": _index(found), **{f"{card.name}.md": page(card) for cards in found.values() for card in cards}}


def card_of(module: ModuleType) -> Card | None:
    """The card of a module, or None if its docstring is no card. Raises BitscapeError for one that lacks a field."""
    first, *lines = (module.__doc__ or "").strip().splitlines() or [""]
    fields: dict[str, str] = {}
    for line in lines:
        start = _FIELD.fullmatch(line)
        if start:
            fields[start[1]] = start[2]
        elif fields and line.strip():
            fields[list(fields)[-1]] += " " + line.strip()
    if "Idea" not in fields:  # a helper may cite a paper without being a method
        return None
    if tuple(fields) != FIELDS:
        raise BitscapeError(f"{module.__name__}: its card has the fields {list(fields)}; it needs {list(FIELDS)}, in this order")
    source = f"src/{module.__name__.replace('.', '/')}.py"
    title, _, gist = first.partition(": ")
    return Card(module.__name__.rpartition(".")[2], source, title, gist, fields, _settings(module))


def page(card: Card) -> str:
    """The card as a markdown page."""
    lines = [f"{MARK} from the docstring of {card.source}; edit that. -->", f"# {_marked_down(card.title)}"]
    lines += [_marked_down(card.gist[:1].upper() + card.gist[1:])]
    lines += [f"**{field}.** {_marked_down(text)}" for field, text in card.fields.items()]
    for kind, settings in card.settings.items():
        rows = [f"| `{_in_cell(field)}` | {_in_cell(_marked_down(meaning))} |" for field, meaning in settings]
        lines += [f"## Settings of `{kind}`", "\n".join(["| field=default | meaning |", "| --- | --- |", *rows])]
    return "\n\n".join([*lines, f"Source: [{card.source}](../../{card.source})"]) + "\n"


def _cards_in(package: str) -> Iterator[Card]:
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    for name in sorted(module.name for module in modules):
        card = card_of(importlib.import_module(f"{package}.{name}"))
        if card is not None:
            yield card


def _settings(module: ModuleType) -> dict[str, list[list[str]]]:
    """Settings, its own and inherited, of what the module adds to the lists of search methods, training steps and quantizers."""
    listed: list[type] = [*METHODS.values(), *training_steps().values(), *get_args(Quantizer)]
    return {kind.__name__: rows for kind in listed if kind.__module__ == module.__name__ and (rows := settings_of(kind))}


def _index(found: dict[str, list[Card]]) -> str:
    lines = [
        f"{MARK} from the docstrings of the method files; edit those. -->",
        "# Methods",
        "One page for each method: paper, idea, what the code computes, where it departs from the paper, its cost, and what was measured.",
    ]
    for heading, cards in found.items():
        lines += [f"## {heading}", "\n".join(f"- [{card.title}]({card.name}.md): {_marked_down(card.gist)}" for card in cards)]
    return "\n\n".join(lines) + "\n"


def _marked_down(text: str) -> str:
    """Plain text as markdown: special characters outside of code are escaped, papers and result pages linked."""
    parts = _CODE.split(text)
    plain = [re.sub(r"[*<\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    linked = [re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", part) for part in plain]
    parts[::2] = [re.sub(rf"\bdocs/({'|'.join(PAGES)})\b", r"[\1](../\1.md)", part) for part in linked]
    return "".join(parts)


def _in_cell(text: str) -> str:
    return text.replace("|", r"\|")
