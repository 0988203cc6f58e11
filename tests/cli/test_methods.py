import pytest

from bitscape.search.methods import METHODS


def test_lists_every_method_with_the_first_line_of_its_card(cli):
    lines = cli("methods").out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_shows_the_card_and_every_setting_with_its_docstring(cli, name):
    shown = cli("methods", name).out
    assert "\nMeasured " in shown
    settings = shown.partition("what it is\n")[2].splitlines()
    fields = METHODS[name].__dataclass_fields__
    assert [line.split("=")[0] for line in settings] == list(fields)
    assert all(len(line.split(None, 1)[1]) > 10 for line in settings)


def test_an_unknown_method_names_the_nearest(refused):
    assert "nearest: fisher" in refused("methods", "fischer")
