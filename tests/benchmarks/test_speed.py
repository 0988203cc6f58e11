from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import speed
from benchmarks.speed import COMPARED, KEPT, KEYS, RESULTS, SEARCHES, alternated, peak_memory, resident, search_step, wanted
from bitscape.report.records import identity, read_runs


class Counted(nn.Sequential):
    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.passes += 1
        return super().forward(x)


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return Counted(*layers).eval()


def test_a_ratio_is_speed_over_the_first_kinds_speed_and_the_order_alternates(monkeypatch: pytest.MonkeyPatch):
    done = []
    monkeypatch.setattr(speed, "clocked", lambda step: {"process_s": step(), "wall_s": 0.25})
    steps = {"mixture": lambda: done.append("m") or 2.0, "asga": lambda: done.append("a") or 5.0}
    found = alternated(steps, images=100, rounds=3)
    assert (found["ratio"], found["mixture_images_per_s"], found["asga_images_per_s"]) == (0.4, 50.0, 20.0)
    assert "".join(done) == "mmaa" + "am" + "ma" + "am"
    assert found["start_up_wall_s"] == {"mixture": 0.5, "asga": 0.5}


def test_memory_is_that_of_the_second_kind_over_the_first(monkeypatch: pytest.MonkeyPatch):
    class Here:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, kind: str, *__: object) -> "Here":
            self.peak = {"float": 4000, "mixture": 5000}[kind]
            return self

        def result(self) -> int:
            return self.peak

    monkeypatch.setattr(speed, "ProcessPoolExecutor", Here)
    run = {"network": "net", "settings": {"batch_size": 2}, "threads": 1}
    assert peak_memory(run, COMPARED["mixture"]) == {"memory_ratio": 1.25, "float_peak_bytes": 4000, "mixture_peak_bytes": 5000}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells resident sizes")
def test_the_peak_remembers_what_was_freed():
    size, before = 256_000_000, resident("VmRSS")  # much more than what earlier tests may have left free
    block = torch.ones(size, dtype=torch.uint8)
    assert resident("VmRSS") > before + 0.6 * size
    del block
    # The kernel counts each thread's last pages late.
    assert resident("VmHWM") > before + 0.6 * size


@pytest.mark.parametrize(("kind", "passes"), [("mixture", 1), ("asga", 2)])
def test_a_search_step_does_its_passes(monkeypatch: pytest.MonkeyPatch, kind: str, passes: int):
    assert set(SEARCHES) == {"mixture", "asga"}
    monkeypatch.setattr(speed, "load", lambda *_: _network())
    step = search_step("net", torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), kind=kind, compiled=False)
    before = Counted.passes
    step()
    step()
    assert Counted.passes - before == 2 * passes


def test_rows_that_were_measured_are_still_wanted():
    plan = {identity(run, KEYS) for threads in (1, 2) for kept in ("default", KEPT) for run in wanted(threads, kept)}
    own = [run for run in read_runs(RESULTS / "speed.jsonl") if run["method"] != "train" or "process" in run["settings"]]
    assert own and all(identity(run, KEYS) in plan for run in own)


def test_compiled_rows_are_left_out_where_no_compiler_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("sys.argv", ["speed", "--only", "mixture resnet20 float32 compiled"])
    speed.main()
    said = "left out: mixture resnet20 float32 compiled: torch.compile needs a C++ compiler, and 'no-such-compiler' is not there\n"
    assert capsys.readouterr().out == said
