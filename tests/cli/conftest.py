"""Commands as fixtures, and for all tests one digits network, a policy and scores.

The policy and the scores are written by hand: what a search finds on a trained network differs from one CPU to another.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitscape.policy import LayerBits, fingerprint
from bitscape.searches.scores import ScoreTable
from tests.cli.run import ENDS, MIXED, MODEL, SHAPES, Shown, run_cli, succeed


@pytest.fixture(scope="session")
def cli() -> Callable[..., Shown]:
    """Run a command that must succeed."""
    return succeed


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line on stderr; return that line."""

    def run(*args: object) -> str:
        shown = run_cli(*args)
        lines = shown.err.strip().splitlines()
        assert shown.code == 2
        assert shown.out == ""
        assert lines[-1].startswith("error: ")
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return run


def _scores() -> ScoreTable:
    """A loss that falls with the bits of the weights and of the input, and a factor for each free layer."""
    candidates = tuple(LayerBits(weight, activation) for weight in range(2, 9) for activation in range(2, 9))
    free = tuple(name for name in SHAPES if name not in ENDS)
    values = [[(1 + row) * (4.0**-pair.weight + 4.0**-pair.activation) for pair in candidates] for row in range(len(free))]
    return ScoreTable(free, candidates, values, "fisher", fingerprint=fingerprint(SHAPES))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.safetensors of a float run of one epoch, and by hand scores.json and mixed.json, which is `MIXED`."""
    folder = tmp_path_factory.mktemp("digits") / "float"
    succeed("train", *MODEL, "--data", "digits", "--epochs", 1, "--lr", 0.1, "--batch-size", 64, "--out", folder)
    MIXED.save(folder / "mixed.json")
    _scores().save(folder / "scores.json")
    return folder
