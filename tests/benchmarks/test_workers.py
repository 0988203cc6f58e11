"""What is measured of several processes, on hand-made times; the processes themselves are tested in tests/engine."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import workers
from benchmarks.workers import (
    KEYS,
    RESULTS,
    SEARCHES,
    TRAINING,
    busy_seconds,
    compared,
    digest,
    measure,
    searched,
    step_seconds,
    trained,
    wanted,
)
from bitscape.data.samples import Samples
from bitscape.data.sources import Dataset
from bitscape.models.layers import quantizable_layers
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.report.records import identity, read_runs
from bitscape.searches.problem import SearchProblem
from recipes.networks import WEIGHTS

CPU = torch.device("cpu")


def seen(wall: float, process: float, same: str = "a") -> dict[str, Any]:
    return {"same": same, "wall_s": wall, "process_s": process}


def network(*_: object) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*layers).eval()


def quantized(_: str, images: Tensor) -> nn.Module:
    model = network()
    return calibrate(with_quantizers(model, Policy(dict.fromkeys(quantizable_layers(model), LayerBits(4, 4)))), images)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A small network and 4 batches of 6 images in place of the real ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator)
    data = Dataset("drawn", images, torch.randint(0, 3, (24,), generator=generator), tuple("abc"))
    replaced = {"load": network, "quantized": quantized, "BATCH_SIZE": 6, "STEPS": 4}
    for name, value in replaced.items():
        monkeypatch.setattr(workers, name, value)
    monkeypatch.setattr("bitscape.load_dataset", lambda *_, **__: data)
    return data


def test_a_step_lasts_from_its_beginning_to_the_next_and_the_first_ones_do_not_count():
    moments = [(0.0, 0.0), (10.0, 9.0), (20.0, 18.0), (21.0, 18.5), (23.0, 19.5), (24.0, 19.75)]
    assert step_seconds(moments) == {"wall_s": 1.0, "process_s": 0.5}


def test_the_slowest_process_counts_and_ratios_are_of_one_round():
    alone = [[seen(2.0, 2.0)], [seen(4.0, 2.0)], [seen(3.0, 3.0)]]
    together = [
        [seen(1.0, 0.5, "b"), seen(2.0, 1.0, "b")],
        [seen(1.0, 1.0, "b"), seen(1.0, 0.5, "b")],
        [seen(2.0, 1.0, "b"), seen(1.0, 1.5, "b")],
    ]
    found = compared(alone, together, images=120)
    assert (found["one_images_per_s"], found["several_images_per_s"]) == (40.0, 60.0)
    assert (found["ratio"], found["ratio_range"]) == (1.5, [1.0, 4.0])
    assert (found["process_ratio"], found["process_ratio_range"]) == (2.0, [2.0, 2.0])
    assert found["rounds"] == 3 and found["same_bits"] is True


@pytest.mark.parametrize("other", ["another process", "another round"])
def test_other_bits_are_an_error(other: str):
    right, wrong = [seen(1, 1, "b"), seen(1, 1, "b")], [seen(1, 1, "b"), seen(1, 1, "c")]
    together = [right, wrong] if other == "another process" else [right, [seen(1, 1, "c"), seen(1, 1, "c")]]
    with pytest.raises(SystemExit, match="of several end with other bits"):
        compared([[seen(1, 1)], [seen(1, 1)]], together, images=1)


def test_a_hash_tells_every_bit_and_no_order():
    value = torch.arange(6.0)
    assert digest({"a": value, "b": -value}) == digest({"b": -value, "a": value})
    closest = value.nextafter(torch.tensor(9.0))
    assert len({digest(each) for each in ({"a": value}, {"a": closest}, {"c": value}, {})}) == 4


def test_one_and_several_are_started_by_turns(monkeypatch: pytest.MonkeyPatch):
    started: list[int] = []

    def launched(_: object, processes: int) -> list[dict[str, Any]]:
        started.append(processes)
        return [seen(1.0, 1.0)] * processes

    monkeypatch.setattr(workers, "launched", launched)
    monkeypatch.setattr(workers, "busy_seconds", lambda: 7.0)
    run = next(wanted(3))
    done = measure(run, rounds=3)
    assert started == [1, 3, 3, 1, 1, 3]
    assert done["extra"]["cores_of_others"] == 0.0
    assert {name: done[name] for name in run} == run


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_that_is_clocked_finds_what_it_finds_otherwise(small: Dataset, method: str):
    images = WEIGHTS[workers.NETWORK].normalization.apply(small.images)
    problem = SearchProblem.of(model=network(), samples=Samples.of(images, small.labels), budget="bitops=w4a4")
    expected = SEARCHES[method](epochs=1, batch_size=6).search(problem)
    moments: workers.Moments = []
    found = searched(method, CPU, moments)
    assert found["scores"].tolist() == expected.scores.values.tolist()
    assert found["bits"].tolist() == [[bits.weight, bits.activation] for bits in expected.policy.layers.values()]
    assert len(moments) == 4


@pytest.mark.parametrize("method", TRAINING)
def test_every_training_step_is_noted_and_trains(small: Dataset, method: str):
    moments: workers.Moments = []
    state = trained(method, CPU, moments)
    assert len(moments) == 4 and moments == sorted(moments)
    assert not torch.equal(state["0.weight"], network().state_dict()["0.weight"])


def test_waiting_processors_and_own_work_are_not_busy_with_others(tmp_path: Path):
    second = os.sysconf("SC_CLK_TCK")
    for name, user, idle in (("before", 100, 1000), ("after", 100 + 7, 1000 + 50)):
        ticks = [user * second, 0, second, idle * second, 3 * second, 0, 0, 0, 0, 0]
        (tmp_path / name).write_text(f"cpu  {' '.join(map(str, ticks))}\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    own = sum(os.times()[:4])
    before, after = (busy_seconds(tmp_path / name) for name in ("before", "after"))
    assert before == pytest.approx(101 - own, abs=0.5)
    assert after - before == pytest.approx(7, abs=0.5)


def test_rows_that_were_measured_are_still_wanted():
    runs = read_runs(RESULTS / "workers.jsonl")
    plans = {identity(run, KEYS) for done in runs for run in wanted(done["settings"]["processes"], done["settings"]["device"])}
    assert runs and all(identity(run, KEYS) in plans for run in runs)
