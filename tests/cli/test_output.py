import pytest

from bitscape.cli.output import amount, cost_text, print_table


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (999_960, "1 M"), (34_710_000_000, "34.71 G"), (1e18, "1e+06 T")],
)
def test_amounts_have_four_digits_and_a_prefix(value, text):
    assert amount(value) == text


def test_costs_carry_their_unit():
    assert cost_text("weight_bytes", 1_200_000) == "1.2 MB"
    assert cost_text("mean_weight_bits", 3.14159) == "3.142"


def test_tables_keep_long_names_and_no_trailing_blanks(capsys):
    name = "stages.0." * 20 + "[bold]conv"
    print_table(["layer", "bits"], [[name, "4/4"], ["b", ""]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(name)
    assert all(line == line.rstrip() for line in lines)
