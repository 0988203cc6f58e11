"""The notebooks run from their first cell to the last, on fewer digits than they show."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from tools.notebooks import NOTEBOOKS, code_cells, read, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_digits")]

NEEDS = {"ethos-u": ("ethosu", "ai_edge_litert")}
"""Notebook -> packages of its extra."""
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_its_cells_show(path: Path, tmp_path: Path):
    for package in NEEDS.get(path.stem, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    kept = read(path)
    notebook = copy.deepcopy(kept)
    with torch.random.fork_rng():
        run(notebook, tmp_path)
    pairs = zip(code_cells(kept), code_cells(notebook), strict=True)
    for number, (before, now) in enumerate(pairs, start=1):
        assert before["execution_count"] == number
        kinds = [[output["output_type"] for output in cell["outputs"]] for cell in (before, now)]
        assert kinds[0] == kinds[1], f"cell {number}: run python -m tools.notebooks"


def test_the_three_notebooks_are_there():
    assert [path.stem for path in PATHS] == ["ethos-u", "first-policy", "own-loop"]
