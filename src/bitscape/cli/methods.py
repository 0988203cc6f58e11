"""`bitscape methods`: what there is to search and to train with, read from the methods' own cards and fields."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import click

from bitscape.cli.output import print_table
from bitscape.cli.parsing import training_steps
from bitscape.errors import BitscapeError, nearest


@click.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the search methods and training steps, or show one: its card and settings.

    \b
    Example:
      bitscape methods
      bitscape methods fisher
    """
    from bitscape.searches.methods import METHODS

    steps = training_steps()
    known: dict[str, Any] = {**METHODS, **steps}
    if name is None:
        _print_list("--method", "what it goes by", METHODS)
        click.echo()
        _print_list("--step", "how it trains", steps)
        return
    if name not in known:
        raise BitscapeError(f"method {name!r} is unknown{nearest(name, known)}; there are {', '.join(known)}")
    click.echo(card(known[name]))
    if settings := settings_of(known[name]):
        click.echo("\nSettings, for --set:")
        print_table(["field=default", "what it is"], settings, left=2)


def _print_list(option: str, about: str, kinds: Mapping[str, Any]) -> None:
    print_table([option, about], [[key, card(kind).splitlines()[0]] for key, kind in kinds.items()], left=2)


def card(kind: type) -> str:
    """Return the method card: the docstring of the method's module."""
    return (sys.modules[kind.__module__].__doc__ or "").strip()


def settings_of(kind: Any) -> list[list[str]]:
    """Return [field=default, docstring under the field] of a settings dataclass."""
    notes = field_docstrings(kind)
    return [[f"{f.name}{'' if f.default is MISSING else f'={f.default}'}", notes.get(f.name, "")] for f in fields(kind)]


def field_docstrings(kind: type) -> dict[str, str]:
    """Return field -> the string literal that stands under it in the source of the class, or of one that it extends."""
    notes: dict[str, str] = {}
    for base in reversed([each for each in kind.__mro__ if is_dataclass(each)]):
        notes |= _own_field_docstrings(base)
    return notes


def _own_field_docstrings(kind: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    notes = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                notes[statement.target.id] = " ".join(value.value.split())
    return notes
