"""The examples of docs/tasks.md run in order, and its tables name every task and method."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import bitscape as bs
from bitscape.engine.task import TaskName
from bitscape.searches.methods import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_every_task_and_method_has_a_row() -> None:
    rows = "\n".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("|"))
    assert [name for name in get_args(TaskName) if f'"{name}"' not in rows] == []
    assert [name for name in METHODS if f"`{name}`" not in rows] == []


@pytest.mark.slow
def test_the_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, "docs/tasks.md", "exec"), names)
    policy, model = names["policy"], names["model"]
    assert isinstance(policy, bs.Policy) and isinstance(model, torch.nn.Module)
    assert policy.layers.keys() == {"0", "2", "4"} and bs.load_packed("pair.safetensors", model)
