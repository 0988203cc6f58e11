import re
from dataclasses import fields

import pytest

from bitscape.cli.parsing import training_steps
from bitscape.searches.methods import METHODS

STEPS = training_steps()


def test_lists_every_method_with_the_first_line_of_its_card(cli):
    lines = cli("methods").out.splitlines()
    searches, steps = lines[1 : 1 + len(METHODS)], lines[3 + len(METHODS) :]
    assert [line.split()[0] for line in searches] == list(METHODS) and [line.split()[0] for line in steps] == list(STEPS)
    assert all(len(line.split()) > 4 for line in (*searches, *steps))


KINDS = {**METHODS, **STEPS}


@pytest.mark.parametrize("name", KINDS)
def test_shows_the_card_and_every_setting_with_its_docstring(cli, name):
    shown = cli("methods", name).out
    assert "\nMeasured " in shown
    settings = shown.partition("what it is\n")[2].splitlines()
    names = [field.name for field in fields(KINDS[name])]
    assert [re.split("[= ]", line)[0] for line in settings] == names
    assert all(len(line.split(None, 1)[1]) > 10 for line in settings)


def test_an_unknown_method_names_the_nearest(refused):
    assert "nearest: fisher" in refused("methods", "fischer")
