import logging

import click
import pytest

from bitscape import words
from bitscape.cli.output import amount, cost_text, logging_to_stderr, print_table, printable_output, short_names, size_ratio
from bitscape.cost.policy_cost import CAPS


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (999_960, "1 M"), (34_710_000_000, "34.71 G"), (1e18, "1e+06 T")],
)
def test_amounts_have_four_digits_and_a_prefix(value, text):
    assert amount(value) == text


def test_costs_carry_their_unit():
    assert cost_text("weight_bytes", 1_200_000) == "1.2 MB"
    assert cost_text("mean_weight_bits", 3.14159) == "3.142"
    assert cost_text("latency_ms", 2.5) == "2.5 ms"
    assert cost_text("bitops", None) == "-"


@pytest.mark.parametrize("kind", [*CAPS, "of their own"])
def test_costs_read_as_in_a_report(kind):
    assert cost_text(kind, 12_345.678) == words.cost_text(kind, 12_345.678).replace(words.NO_BREAK, " ")


@pytest.mark.parametrize(
    ("ratio", "text"), [(6.641, "6.64 times smaller"), (1, "1.00 times smaller"), (0.11, "9.09 times larger"), (0.5, "2.00 times larger")]
)
def test_a_file_that_is_larger_is_not_called_smaller(ratio, text):
    assert size_ratio(ratio) == text
    assert size_ratio(4.96, digits=1) == "5.0 times smaller"


def test_tables_keep_long_names_and_no_trailing_blanks(capsys):
    name = "stages.0." * 20 + "[bold]conv"
    print_table(["layer", "bits"], [[name, "4/4"], ["b", ""]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(name)
    assert all(line == line.rstrip() for line in lines)


def test_what_files_say_does_not_act_on_the_terminal(capsys):
    with printable_output():
        print("layer \x1b[2J\u202e\ud800")
        click.echo("layer \x07\u2066", err=True)
        print_table(["a\x1b[1m", "b"], [["one\ntwo", "4"]])
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [r"layer \x1b[2J\u202e\ud800", r"a\x1b[1m" + 2 * " " + "b", r"one\ntwo" + 2 * " " + "4"]
    assert shown.err == "layer \\x07\\u2066\n"


def test_log_lines_are_lines(capsys):
    with logging_to_stderr():
        logging.getLogger("bitscape.data").warning("skipped %s", "a\nerror: all is lost\x1b[2J.png")
    assert capsys.readouterr().err == "warning: skipped a\\nerror: all is lost\\x1b[2J.png\n"


def test_paths_are_shown_by_their_last_part_unless_several_end_alike():
    assert short_names(["a/x.onnx", "b/y.onnx", "a/x.onnx"]) == {"a/x.onnx": "x.onnx", "b/y.onnx": "y.onnx"}
    assert short_names(["a/x.onnx", "b/x.onnx"]) == {"a/x.onnx": "a/x.onnx", "b/x.onnx": "b/x.onnx"}
