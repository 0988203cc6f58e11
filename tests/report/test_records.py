import datetime
import json
import math
import re
import subprocess
import sys

import pytest
import torch

import bitscape
from bitscape.errors import BitscapeError
from bitscape.report import records
from bitscape.report.records import append_run, environment, identity, missing, read_runs, value_of

RUN = {"network": "resnet20", "method": "fisher", "budget": {"bitops": 3.9e8}, "seed": 0, "top1": 91.5}


def test_the_environment_tells_hardware_and_versions():
    here = environment()
    assert here["cpu"]
    assert here["cores"] >= 1
    assert (here["gpu"] is None) == (not torch.cuda.is_available())
    assert here["versions"]["torch"] == torch.__version__
    assert here["versions"]["bitscape"] == bitscape.__version__
    assert re.fullmatch(r"3\.\d+\.\d+.*", here["versions"]["python"])


def test_runs_come_back_with_their_conditions(tmp_path):
    path = tmp_path / "results" / "ptq.jsonl"
    first = append_run(path, RUN)
    second = append_run(path, {**RUN, "seed": 1, "device": "another", "extra": {"note": "größer"}})
    assert read_runs(path) == [first, second]
    assert first["budget"] == {"bitops": 3.9e8}
    assert first["versions"] == environment()["versions"]
    assert environment()["cpu"] in first["device"] or first["device"] == environment()["gpu"]
    assert second["device"] == "another"
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(first["date"])
    assert datetime.timedelta(seconds=-1) <= age < datetime.timedelta(minutes=10)


def test_every_field_is_accepted(tmp_path):
    run = {name: 1 for name in records.FIELDS if name not in records.STAMPED}
    assert set(append_run(tmp_path / "runs.jsonl", run)) == set(records.FIELDS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_1": 91.0}, r"no field 'top_1'; nearest: top1"),
        ({"commit": "abc"}, "'commit' is set when the run is written"),
        ({"top1": math.nan}, "field 'top1' is nan"),
        ({"settings": {"rho": [math.inf]}}, "field 'settings'"),
        ({"network": torch.nn}, "field 'network'"),
    ],
)
def test_a_wrong_run_is_refused_and_nothing_is_written(tmp_path, fields, message):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(BitscapeError, match=message):
        append_run(path, {**RUN, **fields})
    assert not path.exists()


def test_no_file_means_no_runs(tmp_path):
    assert read_runs(tmp_path / "none.jsonl") == []


def test_every_cut_of_the_last_line_is_reported_and_not_written_over(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_run(path, RUN)
    start = path.stat().st_size
    append_run(path, RUN)
    content = path.read_bytes()
    for length in range(start + 1, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BitscapeError) as caught:
            read_runs(path)
        assert f"{path}, line 2 is damaged" in str(caught.value)
    with pytest.raises(BitscapeError, match="last line is incomplete"):
        append_run(path, RUN)
    assert path.read_bytes() == content[:-1]


@pytest.mark.parametrize("line", ['{"top1": 9', "[1]", '{"top1": NaN}', "", "\x00"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    good = json.dumps(RUN)
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(BitscapeError, match="line 2 is damaged"):
        read_runs(path)


def test_processes_that_append_at_once_lose_no_run(tmp_path):
    path = tmp_path / "runs.jsonl"
    line = json.dumps({"extra": "x" * 20_000})
    code = (
        "import sys, pathlib; from bitscape.report.records import _append_line\n"
        "for _ in range(40): _append_line(pathlib.Path(sys.argv[1]), sys.argv[2])"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), line]) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert len(read_runs(path)) == 80


def test_missing_are_the_runs_that_equal_none():
    runs = [RUN, {**RUN, "seed": 1, "proxy": "cifar100:2000"}, {**RUN, "method": "random", "seed": 2}]
    wanted = [
        {"method": method, "seed": seed, "budget": {"bitops": 390_000_000}, "proxy": None}
        for method in ("fisher", "random")
        for seed in (0, 1, 2)
    ]
    found = missing(runs, wanted, keys=("method", "seed", "budget.bitops", "proxy"))
    assert found == [wanted[1], wanted[2], wanted[3], wanted[4]]
    assert missing(runs, wanted[:1], keys=("method", "seed", "budget", "proxy")) == []


def test_a_wanted_field_must_be_compared():
    with pytest.raises(BitscapeError, match="field 'seed' that is not compared"):
        missing([RUN], [{"method": "fisher", "seed": 7}], keys=("method",))


def test_values_are_looked_up_inside_fields():
    assert value_of(RUN, "budget.bitops") == 3.9e8
    assert value_of(RUN, "budget.weight_bytes") is None
    assert value_of(RUN, "network.depth") is None
    assert value_of(RUN, "proxy") is None
    with pytest.raises(BitscapeError, match="no field 'budgets'; nearest: budget"):
        value_of(RUN, "budgets.bitops")


def test_identity_does_not_depend_on_how_values_are_written():
    one = {"settings": {"images": 256, "widths": (2, 4)}}
    other = {"settings": {"widths": [2, 4], "images": 256.0}}
    assert identity(one, ["settings"]) == identity(other, ["settings"])
    assert identity(one, ["settings"]) != identity({"settings": {"images": 256}}, ["settings"])
