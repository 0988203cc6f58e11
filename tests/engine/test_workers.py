import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bitscape.engine import Batch, StepRecord, feed, workers
from bitscape.engine.step import Part
from bitscape.errors import BitscapeError
from bitscape.steps.sam import SharpStep
from tests.engine import two_workers
from tests.engine.tiny import tiny_batches
from tests.engine.two_workers import listed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"),
]

RUNS = ("plain", "two passes", "partly frozen", "accuracy", "in one go", "continued", "sharp", "sharp continued", "loaded")
SEARCHES = ("differentiable", "held out", "seam")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    two_workers.main(folder)
    return json.loads((folder / "worker0.json").read_text())


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, two_workers.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two(folder_of_two: Path) -> list[dict[str, Any]]:
    return [json.loads((folder_of_two / f"worker{at}.json").read_text()) for at in range(2)]


def test_two_workers_train_as_one_does_on_the_same_batches(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["plain"]["weights"] == pytest.approx(alone["plain"]["weights"], abs=1e-5)
    for together, single in zip(two[0]["plain"]["records"], alone["plain"]["records"], strict=True):
        assert together["images"] == single["images"] == 41
        assert together["top1"] == single["top1"]
        assert together["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert together["gradient_norm"] == pytest.approx(single["gradient_norm"], rel=1e-4)


def test_two_workers_share_the_batches_of_a_loader(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["loaded"]["weights"] == pytest.approx(alone["loaded"]["weights"], abs=1e-5)
    for together, single in zip(two[0]["loaded"]["records"], alone["loaded"]["records"], strict=True):
        assert together == pytest.approx(single, rel=1e-4) and together["images"] == 41
        assert together["square"] == pytest.approx(together["loss"], rel=1e-5)


def test_a_loader_that_gives_each_worker_other_rows_is_refused(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert alone["shared by the loader"] == "finished"
    for seen in two:
        assert "data: its DistributedSampler gives each worker rows of its own" in seen["shared by the loader"]


@pytest.mark.parametrize("what", [*RUNS, *SEARCHES, "asga"])
def test_workers_hold_the_same_bits(two: list[dict[str, Any]], what: str) -> None:
    assert two[0][what] == two[1][what]


def test_a_gradient_counts_where_a_worker_has_one(two: list[dict[str, Any]]) -> None:
    trained, start = two[0]["partly frozen"]["weights"], listed(two_workers.network().state_dict())
    first, second = 8 * 3 * 9 + 8, 12 * 8 * 9 + 12
    assert trained[:first] == start[:first]  # none anywhere
    assert all(before != after for before, after in zip(start[first : first + second], trained[first : first + second], strict=True))


def test_all_cut_a_batch_into_as_many_parts_as_the_worker_with_the_fewest_images(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert alone["parts"] == [5, 5, 5]
    assert [seen["parts"] for seen in two] == [[5, 5, 4]] * 2  # of the last 9 images the second worker has 4


def test_accuracy_together_is_accuracy(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["accuracy"] == pytest.approx(alone["accuracy"], rel=1e-6)
    assert two[0]["accuracy"][3::4] == [41, 9]


def test_every_worker_is_called_after_each_epoch(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["plain"]["hooked"] == [1, 2]
        assert [record["hooked"] for record in seen["plain"]["records"]] == [1.0, 2.0]


def test_each_worker_moves_along_its_own_gradient(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["two passes"]["weights"] != pytest.approx(alone["two passes"]["weights"], abs=1e-5)


class TwoInOne:
    """What two workers do with a batch, one after the other: a step on each part, then the mean of gradients and of what is kept."""

    def __init__(self) -> None:
        self.steps = [SharpStep(settings=two_workers.SHARP) for _ in range(2)]

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        (whole,) = batch.parts
        sums, loss = {}, torch.zeros(())
        for worker, step in enumerate(self.steps):
            model.zero_grad()
            images, labels = whole.inputs[worker::2], whole.targets[worker::2]
            record = step(model, Batch((Part(images, labels, whole.loss, 1.0),)))
            share = len(images) / len(whole)
            loss += share * record.loss
            for parameter in model.parameters():
                sums[parameter] = sums.get(parameter, 0) + share * parameter.grad
        for parameter, gradient in sums.items():
            parameter.grad = gradient
        one, other = self.steps
        one.kept = other.kept = {name: (part + other.kept[name]) / 2 for name, part in one.kept.items()}
        return StepRecord(loss=loss, sums=record.sums)


def test_sharp_steps_of_two_workers_are_those_of_each_on_its_part(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    by_hand = two_workers.trained(TwoInOne(), bits=4)
    found = two[0]["sharp"]
    assert found["weights"] == by_hand["weights"]
    assert found["weights"] != pytest.approx(alone["sharp"]["weights"], abs=1e-5)
    assert [each["loss"] for each in found["records"]] == pytest.approx([each["loss"] for each in by_hand["records"]], rel=1e-5)


def test_sharp_steps_go_on_with_what_they_kept(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for seen in (alone, two[0]):
        assert {**seen["sharp continued"], "hooked": [1, 2]} == seen["sharp"]


def test_a_run_goes_on_where_it_stopped(two: list[dict[str, Any]], folder_of_two: Path) -> None:
    about = json.loads((folder_of_two / "again" / "run.json").read_text())
    assert about["workers"] == 2
    assert {**two[0]["continued"], "hooked": [1, 2]} == two[0]["in one go"]
    assert len((folder_of_two / "again" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("what", SEARCHES)
def test_two_workers_find_the_policy_that_one_finds(alone: dict[str, Any], two: list[dict[str, Any]], what: str) -> None:
    assert two[0][what]["policy"] == alone[what]["policy"]
    for together, single in zip(two[0][what]["scores"], alone[what]["scores"], strict=True):
        assert together == pytest.approx(single, abs=1e-4)


def test_one_worker_goes_on_where_two_stopped(two: list[dict[str, Any]], folder_of_two: Path) -> None:
    result = two_workers.trained(two_workers.OnePass(), norm=True, folder=folder_of_two / "half of again")
    assert json.loads((folder_of_two / "half of again" / "run.json").read_text())["workers"] == 1
    assert result["records"][0] == two[0]["continued"]["records"][0]
    assert result["records"][1]["images"] == 41
    assert result["hooked"] == [2]


@pytest.mark.parametrize("worker", [0, 1, 2])
@pytest.mark.parametrize("kind", ["Batches", "other"])
def test_parts_together_are_the_batch(monkeypatch: pytest.MonkeyPatch, worker: int, kind: str) -> None:
    batches: Any = two_workers.batches() if kind == "Batches" else tiny_batches()
    whole = list(batches.epoch(1, start=1))
    monkeypatch.setattr(feed, "world_size", lambda: 3)
    monkeypatch.setattr(feed, "rank", lambda: worker)
    for (images, labels), (own, samples) in zip(whole, feed.own_part(batches, 1, start=1), strict=True):
        assert torch.equal(own.inputs, images[worker::3]) and torch.equal(own.targets, labels[worker::3])
        assert samples == len(images)


def test_a_batch_without_an_image_for_each_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "rank", lambda: 8)
    for module in (feed, workers):
        monkeypatch.setattr(module, "world_size", lambda: 9)
    feed.check_shared(two_workers.batches())  # the last batch has 9 images
    for module in (feed, workers):
        monkeypatch.setattr(module, "world_size", lambda: 10)
    with pytest.raises(BitscapeError, match="batch of 9 images cannot be shared by 10 workers; use a larger batch_size, drop_last"):
        feed.check_shared(two_workers.batches())


def test_workers_that_cannot_be_reached_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(BitscapeError, match="WORLD_SIZE is 2, and RANK, MASTER_PORT not set; start with torchrun"):
        workers.join(torch.device("cpu"))


def test_alone_everything_is_given_back() -> None:
    value = torch.arange(3.0)
    assert workers.total(value) is value and workers.mean(value) is value
    before = torch.get_rng_state()
    workers.seed_at(1, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_on_one_stops_all(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert "loss or gradient is not finite at epoch 1 of 2, batch 0" in seen["broken"]
        assert "of 2 (from 0), all weights and layer outputs are finite" in seen["broken"]
