"""Commands as fixtures, and one trained digits network with a search for all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.run import MODEL, Shown, run_cli, succeed


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.safetensors of a float run, and scores.json and policy.json of a search on it."""
    folder = tmp_path_factory.mktemp("digits") / "float"
    succeed("train", *MODEL, "--data", "digits", "--epochs", 4, "--lr", 0.1, "--batch-size", 64, "--out", folder)
    files = ("--weights", folder / "model.safetensors", "--scores", folder / "scores.json")
    budgets = ("--budget", "bitops=w4a4", "--budget", "weight_bytes=15kB")
    succeed("search", *MODEL, *files, "--data", "digits", "--images", 32, *budgets, "--out", folder / "found.json")
    return folder
