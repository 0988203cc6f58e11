import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.engine import two_workers

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")


def run(folder: Path, *launcher: str) -> None:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, two_workers.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workers") / "alone"
    run(folder)
    return json.loads((folder / "worker0.json").read_text())


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "two"
    run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
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


@pytest.mark.parametrize("what", ["plain", "two passes", "in one go", "continued", "differentiable", "held out", "seam", "asga"])
def test_workers_hold_the_same_bits(two: list[dict[str, Any]], what: str) -> None:
    assert two[0][what] == two[1][what]


def test_each_worker_moves_along_its_own_gradient(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["two passes"]["weights"] != pytest.approx(alone["two passes"]["weights"], abs=1e-5)


def test_a_run_goes_on_where_it_stopped(two: list[dict[str, Any]], folder_of_two: Path) -> None:
    about = json.loads((folder_of_two / "again" / "run.json").read_text())
    assert about["workers"] == 2
    assert two[0]["continued"] == two[0]["in one go"]
    assert len((folder_of_two / "again" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("what", ["differentiable", "held out", "seam"])
def test_two_workers_find_the_policy_that_one_finds(alone: dict[str, Any], two: list[dict[str, Any]], what: str) -> None:
    assert two[0][what]["policy"] == alone[what]["policy"]
    for together, single in zip(two[0][what]["scores"], alone[what]["scores"], strict=True):
        assert together == pytest.approx(single, abs=1e-4)


def test_a_loss_that_is_not_finite_on_one_stops_all(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert "loss or gradient is not finite at epoch 1 of 2, batch 0" in seen["broken"]
