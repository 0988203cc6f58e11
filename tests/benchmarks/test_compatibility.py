import json

import pytest

from benchmarks import compatibility, zoo
from benchmarks.compatibility import PARTS, measure, travel
from benchmarks.compatibility_summaries import compatibility as table
from benchmarks.zoo import Entry, images
from bitscape.errors import BitscapeError
from tests.needs import runtime_or_skip

pytestmark = pytest.mark.slow

SOURCE = """
from torch import nn

def net():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *head)
"""


@pytest.fixture
def small(monkeypatch, tmp_path) -> str:
    (tmp_path / "net.py").write_text(SOURCE)
    name = f"{tmp_path}/net.py:net"
    monkeypatch.setitem(zoo.ENTRIES, name, Entry(family="small", size=12))
    return name


def ended(run: dict, part: str) -> str:
    return run["extra"]["parts"][part]["outcome"]


def test_a_network_goes_all_the_way(small):
    runtime_or_skip("onnxruntime")
    runtime_or_skip("openvino")
    found = {result["part"]: result for result in travel(small)}
    assert list(found) == list(PARTS)
    assert {name: result["outcome"] for name, result in found.items()} == dict.fromkeys(PARTS, "works"), found
    assert found["cost"]["counted_macs"] == 1 and found["search"]["mean_weight_bits"] <= 8


def test_a_part_that_others_need_ends_the_way(small, monkeypatch):
    def refuse(self):
        raise BitscapeError("layer conv: not today")

    monkeypatch.setattr(compatibility.Journey, "search", refuse)
    *_, last = travel(small)
    assert (last["part"], last["outcome"], last["reason"]) == ("search", "refused", "layer conv: not today")


def test_a_crash_is_told_from_a_refusal_and_the_way_goes_on(small, monkeypatch):
    def crash(self):
        raise KeyError("val_13")

    monkeypatch.setattr(compatibility.Journey, "train", crash)
    monkeypatch.setattr(compatibility.Journey, "_export", lambda self, kind, name: {})
    found = {result["part"]: result for result in travel(small)}
    assert found["train"]["outcome"] == "fails" and "val_13" in found["train"]["reason"]
    assert found["openvino"]["outcome"] == "works"


def stub_process(monkeypatch, *parts: str, code: int, last: str = "works") -> None:
    """Let the process write these parts, all but the last working, say something, and end."""
    real = compatibility.subprocess.run

    def run(command, **settings):
        with open(command[-1], "w") as results:
            for part in parts:
                print(json.dumps({"part": part, "outcome": last if part == parts[-1] else "works", "reason": "none"}), file=results)
        return real(["/bin/sh", "-c", f"echo what a library prints; echo out of memory >&2; exit {code}"], **settings)

    monkeypatch.setattr(compatibility.subprocess, "run", run)


@pytest.mark.parametrize("reached", [0, 1, 4])
@pytest.mark.parametrize("last", ["works", "refused"])
def test_what_a_process_that_ends_did_not_reach_has_failed(small, monkeypatch, reached, last):
    stub_process(monkeypatch, *PARTS[:reached], code=139, last=last)
    run = measure({"network": small, "seed": 0})
    if last == "refused" and reached == 1:  # there is no network to go on with
        assert list(run["extra"]["parts"]) == ["build"]
        return
    assert [ended(run, part) for part in PARTS[reached:]] == ["fails"] * (7 - reached)
    assert "139: out of memory" in run["extra"]["parts"][PARTS[-1]]["reason"]
    assert table([run]).splitlines()[2].count("yes") == max(0, reached - 2 - (last == "refused"))


def test_a_process_that_does_all_parts_fails_none(small, monkeypatch):
    stub_process(monkeypatch, *PARTS, code=0)
    assert {ended(measure({"network": small}), part) for part in PARTS} == {"works"}


def test_images_are_the_same_each_time_and_fill_the_range():
    first = images(32)
    assert first.shape == (8, 3, 32, 32) and first.float().std() > 40
    assert first.equal(images(32))


def a_run(network: str, **parts: dict) -> dict:
    cost = {"outcome": "works", "layers": 21, "counted_macs": 0.987}
    return {"network": network, "extra": {"family": "Net", "size": 96, "parts": {"build": {"outcome": "works"}, "cost": cost, **parts}}}


def test_the_table_numbers_each_reason_once_and_counts_what_works():
    works, refused = {"outcome": "works"}, {"outcome": "refused", "reason": "layer a | b:\nnot so"}
    done = dict.fromkeys(("search", "train", "packed", "onnx"), works)
    rows, _, reason = table([a_run("timm:a", **done, openvino=refused), a_run("timm:b", **{**done, "openvino": refused})]).partition("\n\n")
    assert rows.splitlines()[2] == "| `timm:a` | Net | 96 | 21 | 99 % | yes | yes | yes | yes | refused (1) |"
    assert rows.splitlines()[-1].endswith("| 2 of 2 | 2 of 2 | 2 of 2 | 2 of 2 | 0 of 2 |")
    assert reason == "1. layer a / b: not so"


def test_layers_that_are_no_integers_are_told():
    works = {"outcome": "works"}
    onnx, openvino = {**works, "integer_layers": 19}, {**works, "integer_layers": 21}
    text = table([a_run("timm:a", search=works, train=works, packed=works, onnx=onnx, openvino=openvino)])
    assert "| yes | yes | yes | yes, 19 layers | yes |" in text


def test_parts_that_were_not_tried_name_the_part_that_stopped_them():
    text = table([a_run("timm:a", search={"outcome": "fails", "reason": "no"})])
    assert "| fails (1) | fails (1) | fails (1) | fails (1) | fails (1) |" in text
