from typing import Any

from benchmarks.workers_summaries import workers


def run(method: str, processes: int = 2, device: str = "cpu", **extra: Any) -> dict[str, Any]:
    found = {"one_images_per_s": 400.04, "several_images_per_s": 700.0, "ratio": 1.75, "ratio_range": [1.5, 1.875]}
    ratios = {"process_ratio": 1.9, "process_ratio_range": [1.85, 1.95], "same_bits": True, "rounds": 3, "cores_of_others": 0.02}
    settings = {"processes": processes, "batch_size": 128, "device": device}
    return {"network": "net", "method": method, "variant": "training", "settings": settings, "extra": {**found, **ratios, **extra}}


def test_a_row_has_both_speeds_and_what_is_gained():
    title, _, head, rule, row = workers([run("plain")]).splitlines()
    assert title == "**net, batches of 128 images**; on the CPU, one thread a process, 3 starts each"
    assert row == "| plain, training | 400.0 | 700.0 | 1.75 [1.50, 1.88] | 1.90 [1.85, 1.95] | yes | 0.02 |"
    assert "| 2 processes, images/s |" in head
    assert head.count("|") == rule.count("|") == row.count("|")


def test_each_number_of_processes_has_its_table():
    text = workers([run("plain"), run("plain", 8, "cuda"), run("saq")])
    assert text.count("**net") == 2 and "| 8 processes, images/s |" in text and "on GPUs, one a process" in text
    first, second = text.split("**net")[1:]
    assert "saq" in first and "saq" not in second
