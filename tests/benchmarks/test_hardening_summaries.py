from typing import Any

from benchmarks.hardening_summaries import hardening


def run(method: str, variant: str, settings: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"method": method, "variant": variant, "settings": settings, "extra": {"bad": 0, **extra}}


READ = {"cases": 10_000, "refused": 8_900, "refused_when_used": 100, "loaded": 1_000, "slowest_s": 0.123, "peak_mib": 351.6, "wall_s": 99.6}
RUNS = [
    run("write", "policy", {"condition": "full disk"}, exit=2, message="error: .../policy.json: No space left on device"),
    run("fuzz", "packed", {"cases": 10_000}, **READ),
    run("kill", "train", {"kills": 10}, kills=10, while_writing=4, left_files=1, whole_s=9.4),
    run("fuzz", "policy", {"cases": 10_000}, **READ),
]


def test_each_kind_of_run_has_its_table_in_a_fixed_order():
    text = hardening(RUNS)
    read, killed, written = text.split("**")[2::2]
    assert "| packed | 10,000 | 8,900 | 100 | 1,000 | 0 | 0.12 | 352 | 100 |\n| policy | 10,000 |" in read
    assert "| train | 10 | 4 | 0 | 1 | 9 |" in killed
    assert "| policy | full disk | 2 | 0 | `error: .../policy.json: No space left on device` |" in written
    for table in (read, killed, written):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1


def test_kinds_without_runs_are_left_out():
    assert "kill" not in hardening(RUNS[:2]).lower()
    assert hardening([]) == ""
