from typing import Any

from benchmarks.first_policy_summaries import first_policy

SETTINGS = {"images": 512, "budget": "bitops=w4a4", "pip_cache": False, "python": "3.11"}


def run(torch_s: float, search_s: float, load: float = 0.5) -> dict[str, Any]:
    steps = {"build the wheel": 5.0, "install torch": torch_s, "bitscape search": search_s}
    sizes = {"environment_mb": 1234.5, "torch_mb": 800.0, "bitscape_mb": 1.25, "wheel_kb": 345.6, "wheel_files": 190}
    installed = {"torch": "2.13.0+cpu", "bitscape": "0.1.0", "pip": "24.0"}
    return {
        "settings": SETTINGS,
        "extra": {"steps_s": steps, "to_policy_s": torch_s + search_s, **sizes, "installed": installed, "load_average": [load, 1.0]},
    }


def test_each_step_has_its_seconds_and_the_counted_ones_are_marked():
    about, _, *lines = first_policy([run(60.0, 4.0)]).splitlines()
    assert about.startswith(
        "Python 3.11, 512 images, budget bitops=w4a4, pip without its cache: 3 packages, torch 2.13.0+cpu; environment 1,234 MB"
    )
    assert lines[2:] == [
        "| build the wheel |  | 5.0 |",
        "| install torch | yes | 60.0 |",
        "| bitscape search | yes | 4.0 |",
        "| from nothing to the policy | sum | 64.0 |",
    ]


def test_several_runs_give_median_and_range():
    text = first_policy([run(60.0, 4.0), run(90.0, 5.0, load=4.26), run(61.0, 4.5)])
    assert "Load average 0.5 to 4.3." in text
    assert "| install torch | yes | 61.0 [60.0, 90.0] |" in text
    assert "| from nothing to the policy | sum | 65.5 [64.0, 95.0] |" in text
