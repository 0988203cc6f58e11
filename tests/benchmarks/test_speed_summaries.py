from typing import Any

import pytest

from benchmarks.speed_summaries import exponent, speed

LOAD = {"load_average": [0.1, 0.24]}


def ratio(method: str, **extra: Any) -> dict[str, Any]:
    speeds = {"ratio": 0.9, "ratio_quartiles": [0.88, 0.9, 0.91], "float_images_per_s": 50.0, f"{method}_images_per_s": 45.0}
    settings = {"batch_size": 8, "allocator": "default"}
    shared = {"network": "resnet20", "variant": "eager", "dtype": "float32", "settings": settings}
    return {"method": method, **shared, "extra": {**speeds, "start_up_wall_s": {"float": 1, method: 2}, **LOAD, **extra}}


def rows(text: str) -> list[str]:
    """Lines of a table below its head."""
    return text.split("---: |\n")[1].splitlines()


def test_a_ratio_stands_beside_its_goal():
    text = speed([ratio("brevitas"), ratio("mixture", memory_ratio=1.25), ratio("train")])
    shared = "eager | float32 | given back | 0.900 [0.880, 0.910]"
    assert rows(text) == [
        f"| resnet20 | 8 | LSQ | {shared} | 0.92 | 50.0 | 45.0 | 2.0 | - | 0.2 |",
        f"| resnet20 | 8 | Brevitas | {shared} | - | 50.0 | 45.0 | 2.0 | - | 0.2 |",
        f"| resnet20 | 8 | mixture search | {shared} | 0.80 | 50.0 | 45.0 | 2.0 | 1.25 | 0.2 |",
    ]


def test_kernels_are_told_in_copies_of_their_type():
    def run(variant: str, dtype: str, milliseconds: float) -> dict[str, Any]:
        extra = {"forward_ms": milliseconds, "backward_ms": 2 * milliseconds, "start_up_wall_s": 0.5, **LOAD}
        return {"method": "kernel", "variant": variant, "dtype": dtype, "settings": {"shape": "2 3"}, "extra": extra}

    text = speed([run("native", "float32", 6), run("copy", "float32", 4), run("copy", "bfloat16", 2)])
    assert text.startswith("**One tensor (2, 3) quantized**")
    assert rows(text)[:2] == ["| native | float32 | 6.0 | 12.0 | 1.50 | 0.50 | 0.2 |", "| copy | float32 | 4.0 | 8.0 | 1.00 | 0.50 | 0.2 |"]


def test_jobs_have_time_and_memory():
    measured = {"search_s": 3.21, "peak_bytes": 120_400_000, "extra": {"wall_s": 2.0, **LOAD}}
    run = {"method": "job", "network": "net", "variant": "compress", "settings": {"images": 16}, "threads": 2, **measured}
    assert rows(speed([run])) == ["| net | compress | 16 | 2 | 3.2 | 2.0 | 120 | 0.2 |"]


def test_growth_is_told_by_its_exponents():
    shared = {"method": "growth", "variant": "pixels", "extra": LOAD}
    each = [{"settings": {"pixels": n}, "search_s": n * n / 100, "peak_bytes": n * 10**6} for n in (10, 20, 40)]
    assert rows(speed([{**shared, **one} for one in each])) == ["| pixels | 10, 20, 40 | 1.0, 4.0, 16.0 | 2.00 | 10, 20, 40 | 1.00 |"]


def test_one_value_has_no_exponent():
    assert exponent([4], [2.0]) is None
    assert exponent([1, 2, 4], [3.0, 3.0, 3.0]) == pytest.approx(0)
