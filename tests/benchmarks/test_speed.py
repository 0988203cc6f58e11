from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import speed_steps
from benchmarks.speed import KEYS, MEASURES, RESULTS, do, label, wanted
from benchmarks.speed_clock import forget_peak, resident
from benchmarks.speed_jobs import measured_job
from benchmarks.speed_kernels import MEANS, numba_passes
from benchmarks.speed_steps import COMPARED, SEARCHES, alternated, peak_memory, search_step
from bitscape.quant import reference
from bitscape.quant.grid import Grid
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
    monkeypatch.setattr(speed_steps, "clocked", lambda step: {"process_s": step(), "wall_s": 0.25})
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

    monkeypatch.setattr(speed_steps, "ProcessPoolExecutor", Here)
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
    monkeypatch.setattr(speed_steps, "published", lambda _: _network())
    step = search_step("net", torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), kind=kind, compiled=False)
    before = Counted.passes
    step()
    step()
    assert Counted.passes - before == 2 * passes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux with glibc tells it")
def test_what_a_job_is_made_of_counts_in_its_peak_and_what_making_it_needed_does_not():
    size = 256_000_000

    def make() -> Callable[[], object]:
        torch.ones(4 * size, dtype=torch.uint8)
        kept = torch.ones(size, dtype=torch.uint8)
        return lambda: kept.clone()

    forget_peak()
    assert 1.5 * size < measured_job(make)["peak_bytes"] < 3 * size


def test_numba_computes_what_is_defined():
    pytest.importorskip("numba")
    x, gradient = torch.randn(2, 3, 4, 50, generator=torch.Generator().manual_seed(0))
    scale, grid = torch.tensor(0.3), Grid(-8, 7)
    forward, backward = numba_passes()
    torch.testing.assert_close(forward(x, scale, grid), reference.quantized(x, scale, grid))
    found, defined = (each(gradient, x, scale, grid) for each in (backward, reference.quantized_backward))
    for one, other in zip(found, defined, strict=True):
        torch.testing.assert_close(one, other)


def test_every_run_has_what_measures_it_and_a_label_of_its_own():
    runs = list(wanted())
    assert {run["method"] for run in runs} == set(MEASURES)
    assert {run["variant"] for run in runs if run["method"] == "kernel"} == set(MEANS)
    labels = [label(run) for run in runs if run["method"] != "growth"]
    assert len(set(labels)) == len(labels)


def test_rows_that_were_measured_are_still_wanted():
    plan = {identity(run, KEYS) for run in wanted()}
    runs = read_runs(RESULTS / "speed.jsonl")
    assert all(identity(run, KEYS) in plan for run in runs)


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("mixture resnet20 float32 compiled", "torch.compile needs a C++ compiler, and 'no-such-compiler' is not there"),
        ("pt2e resnet20 float32 eager", "torchao is not installed"),
        ("kernel float32 numba", "numba is not installed"),
    ],
)
def test_runs_that_cannot_be_done_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], which: str, reason: str
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    do(next(run for run in wanted() if label(run) == f"{which} kept threads=1"), rounds=1)
    assert capsys.readouterr().out == f"left out: {which} kept threads=1: {reason}\n"
