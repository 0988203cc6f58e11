"""`bitscape analyze`: its table, its file, and its page in a report."""

import pytest

from bitscape.measure.analysis.result import Analysis
from tests.cli.run import MIXED, MODEL

ANALYZE = ("analyze", *MODEL, "--data", "digits", "--images", 16, "--compared", 4)


@pytest.mark.slow
def test_the_table_shows_the_worst_layers_and_the_file_goes_into_a_report(cli, tmp_path):
    policy, out = tmp_path / "policy.json", tmp_path / "analysis.json"
    MIXED.save(policy)
    shown = cli(*ANALYZE, "--policy", policy, "--layers", 2, "--out", out).out.splitlines()
    found = Analysis.load(out)
    assert {name: layer.bits for name, layer in found.layers.items()} == {
        name: str(bits) for name, bits in MIXED.layers.items()
    }
    assert shown[0] == "Analysis: 8 layers, task classes, 16 samples, outputs of 4 compared"
    assert [line.split()[0] for line in shown[3:5]] == found.by_error()[:2]
    assert shown[6].startswith("less error: 6 more layers. all quantized: error ")
    assert shown[-1] == f"analysis: {out}"
    page = tmp_path / "report.html"
    cli("report", out, policy, "--out", page)
    assert "Error by layer" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "4/8", "--policy", "pyproject.toml"), "give at most one of them"),
        (("--bits", "4"), "--bits: bits '4': write weight/activation bits"),
        (("--bits", "9/8"), "--bits: weight bits are 9"),
    ],
)
def test_bits_that_cannot_be_used_are_refused(refused, options, message):
    assert message in refused(*ANALYZE, *options)
