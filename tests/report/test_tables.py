import pytest

from bitscape.errors import BitscapeError
from bitscape.report.tables import Column, Summary, aggregate, render, update_tables

RUNS = [
    {"method": "fisher", "budget": {"bitops": 3.9e8}, "seed": 0, "top1": 91.0, "search_s": 2.0},
    {"method": "random", "budget": {"bitops": 3.9e8}, "seed": 0, "top1": 85.0},
    {"method": "fisher", "budget": {"bitops": 390_000_000}, "seed": 1, "top1": 92.0, "search_s": 4.0},
    {"method": "fisher", "budget": {"bitops": 3.9e8}, "seed": 2, "top1": 93.0},
]
DOCUMENT = """# Results

<!-- table: ptq -->
| old |
<!-- end -->

Text about `<!-- table: NAME -->` stays.
<!-- table: ptq -->
<!-- end -->
"""


def test_runs_that_agree_in_the_keys_are_summarized():
    fisher, random = aggregate(RUNS, ["method", "budget"], ["top1", "search_s"])
    assert fisher.keys["method"] == "fisher"
    assert fisher.n == 3
    assert fisher.summaries["top1"] == Summary(92.0, 1.0, 3)
    assert fisher.summaries["search_s"] == Summary(3.0, pytest.approx(2**0.5), 2)
    assert random.summaries == {"top1": Summary(85.0, None, 1), "search_s": None}


def test_a_seed_counts_once():
    with pytest.raises(BitscapeError, match=r"repeat a seed \(seeds \[0, 0, 1, 2\]\); add a key"):
        aggregate(RUNS, ["budget"], ["top1"])


def test_runs_without_a_seed_are_repetitions():
    timed = [{"method": "fisher", "search_s": seconds} for seconds in (1.0, 3.0)]
    assert aggregate(timed, ["method"], ["search_s"])[0].summaries["search_s"].mean == 2.0


def test_only_numbers_are_averaged():
    with pytest.raises(BitscapeError, match="'method' is 'fisher'"):
        aggregate(RUNS, ["seed", "method"], ["method"])
    with pytest.raises(BitscapeError, match="no field 'top'"):
        aggregate(RUNS, ["method"], ["top"])


def test_a_table_shows_spread_and_number_of_runs():
    rows = aggregate(RUNS, ["method", "budget", "proxy"], ["top1", "search_s"])
    keys = {"method": "method", "budget": "budget", "proxy": "proxy"}
    minutes = Column(value="search_s", heading="search, min", digits=3, scale=1 / 60)
    columns = [Column(value="top1", heading="top-1, %"), minutes]
    assert render(rows, keys, columns).splitlines() == [
        "| method | budget | proxy | top-1, % | search, min | n |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| fisher | bitops=3.9e+08 | - | 92.00 ± 1.00 | 0.050 ± 0.024 (n=2) | 3 |",
        "| random | bitops=3.9e+08 | - | 85.00 | - | 1 |",
    ]


def test_a_bar_in_a_cell_does_not_end_it():
    rows = aggregate([{"variant": "a|b", "top1": 1.0}], ["variant"], ["top1"])
    assert r"| a\|b | 1.00 | 1 |" in render(rows, {"variant": "variant"}, [Column(value="top1", heading="top-1")])


def test_tables_are_replaced_and_the_rest_stays():
    updated = update_tables(DOCUMENT, {"ptq": "| new |\n", "unused": "| x |"})
    assert updated == DOCUMENT.replace("| old |\n", "").replace("ptq -->\n", "ptq -->\n| new |\n")
    assert update_tables(updated, {"ptq": "| new |"}) == updated


def test_a_document_without_markers_stays_as_it_is():
    for document in ("", "text", "text\r\nmore\r\n"):
        assert update_tables(document, {}) == document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("\n<!-- table: pqt -->\n<!-- end -->", "line 2: there is no table 'pqt'; nearest: ptq"),
        ("<!-- table: ptq -->\n", "line 1: table 'ptq' is not closed"),
        ("<!-- table: ptq -->\n<!--table:ptq-->\n<!-- end -->", "line 1: table 'ptq' is not closed"),
        ("text\n<!-- end -->\n", "line 2: an end marker that closes no table"),
    ],
)
def test_wrong_markers_are_errors(document, message):
    with pytest.raises(BitscapeError, match=message):
        update_tables(document, {"ptq": "| new |"})
