import pytest

from bitscape.cost.policy_cost import CAPS
from bitscape.words import NAMES, NO_BREAK, amount, cost_text, counted, listed, percent


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("bitops", 4_796_416, "4.796 M"),
        ("bitops", 999, "999"),
        ("weight_bytes", 12_264, "12.26 kB"),
        ("peak_activation_bytes", 8, "8 B"),
        ("mean_weight_bits", 3.06401, "3.064"),
        ("latency_ms", 2.5, "2.5 ms"),
        ("of their own", 2.0, "2"),
        ("bitops", None, "-"),
    ],
)
def test_costs_have_their_units(kind: str, value: float | None, words: str) -> None:
    assert cost_text(kind, value).replace(NO_BREAK, " ") == words


def test_every_kind_of_cost_has_its_name_and_the_unit_that_costs_have() -> None:
    assert list(NAMES) == list(CAPS)
    endings = {"": "1 M", "bytes": "1 MB", "bits": "1e+06", "ms": "1e+06 ms"}
    for kind, cap in CAPS.items():
        assert cost_text(kind, 1e6).replace(NO_BREAK, " ") == endings[cap.unit]


def test_amounts_change_their_prefix_where_four_digits_end() -> None:
    assert amount(999.94) == "999.9"
    assert amount(999.96) == f"1{NO_BREAK}k"


def test_shares_counts_and_lists() -> None:
    assert percent(1, 3) == f"33.3{NO_BREAK}%"
    assert percent(1, None) == percent(None, 3) == percent(1, 0) == "-"
    assert (counted(1, "run"), counted(2, "run")) == ("1 run", "2 runs")
    assert (listed(["a"]), listed("ab"), listed("abc")) == ("a", "a and b", "a, b and c")
