from benchmarks.ptq import wanted
from benchmarks.ptq_summaries import ptq

ABOUT = {"network": "net", "metric": "top1", "float_value": 90.0, "variant": "4bit"}
ABOUT |= {"proxy": "own", "settings": {"repair": "compensate"}, "seed": 0}
ABOUT |= {"extra": {"quantize_s": 12.4}}


def _rows(runs):
    return [table.splitlines()[2:] for table in ptq(runs).split("\n\n")]


def test_policies_stand_beside_the_better_uniform_one_of_the_same_draw():
    runs = [
        {**ABOUT, "method": "float", "variant": None, "value": 90.0},
        *({**ABOUT, "method": "uniform", "seed": at, "value": 87.0} for at in range(2)),
        *({**ABOUT, "method": "two widths", "seed": at, "value": 86.0 + 2 * at} for at in range(2)),
        *({**ABOUT, "method": "fisher", "seed": at, "value": 89.0} for at in range(2)),
        {**ABOUT, "method": "fisher", "proxy": "foreign", "value": 88.5},
    ]
    (row,), steps = _rows(runs)
    assert row == (
        "| net | top1 | 4bit | 90.00 | 87.00 (n=2) | 87.00 (n=2) | - | - | 89.00 (n=2) | - "
        "| 88.50 | +1.50 [-4.85, +7.85], no difference seen |"
    )
    assert steps == []


def test_each_step_of_repair_has_its_value_and_its_time():
    runs = [
        {**ABOUT, "method": "fisher", "settings": {"repair": repair}, "value": value}
        for repair, value in ((None, 10.0), ("compensate", 88.0), ("tune", 89.0))
    ]
    steps = _rows(runs)[1]
    assert steps == [
        "| net | 4bit | fisher | 90.00 | 10.00 in 12 s | 88.00 in 12 s | 89.00 in 12 s | - |"
    ]


def test_runs_with_the_default_repair_come_first():
    runs = [run for run in wanted(("resnet20",)) if run["method"] != "float"]
    assert {run["settings"]["repair"] for run in runs[:21]} == {"compensate"}
    assert {run["network"] for run in runs} == {"resnet20"}
