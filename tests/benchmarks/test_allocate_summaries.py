from typing import Any

from benchmarks.allocate import made_network
from benchmarks.allocate_summaries import allocate


def run(seconds: float, gap: float, **settings: int) -> dict[str, Any]:
    sizes = {"layers": 60, "pairs": 25, "caps": 2, **settings}
    return {"network": "random", "settings": sizes, "search_s": seconds, "extra": {"gap": gap}}


def test_a_row_has_the_times_and_how_many_are_proven() -> None:
    head, rule, first, second = allocate([run(1.0, 0.0), run(3.0, 0.0), run(5.0, 0.0125), run(2.0, 0.0, layers=500)]).splitlines()
    assert first == "| random | 60 | 25 | 2 | 3.00 | 5.00 | 2 of 3 | 1.25% |"
    assert second == "| random | 500 | 25 | 2 | 2.00 | 2.00 | 1 of 1 | 0 |"
    assert head.count("|") == rule.count("|") == first.count("|")


def test_nearly_equal_layers_differ_by_the_spread_at_most() -> None:
    for name, spread in (("near 3e-9", 3), ("near 1e-6", 1000)):
        macs = [layer.macs for layer in made_network(name, 50, 0).layers]
        assert 10**9 <= min(macs) < max(macs) < 10**9 + spread
