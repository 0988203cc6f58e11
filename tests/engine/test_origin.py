import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitscape.engine import origin


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that holds a copy of the module, and git isolated from the user's settings."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setattr(origin, "__file__", str(shutil.copy(origin.__file__, tmp_path)))
    git(tmp_path, "init")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_code(checkout):
    assert origin.commit() is None
    git(checkout, "add", "origin.py")
    git(checkout, "commit", "-m", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (checkout / "results.jsonl").write_text("{}\n")
    assert origin.commit() == commit
    (checkout / "benchmark.py").write_text("\n")
    assert origin.commit() == f"{commit}-dirty"


def test_a_copy_that_git_does_not_know_has_no_commit(checkout):
    (checkout / "other.txt").write_text("a user's own project")
    git(checkout, "add", "other.txt")
    git(checkout, "commit", "-m", "first")
    assert origin.commit() is None


@pytest.mark.parametrize(
    ("module", "argv", "expected"),
    [
        (None, ["/usr/bin/bitscape", "train", "--data", "my photos"], "bitscape train --data 'my photos'"),
        (None, ["folder/train.py", "--lr", "0.1"], "python train.py --lr 0.1"),
        ("bitscape.cli.__main__", ["/there/__main__.py", "train"], "python -m bitscape.cli train"),
        ("benchmarks.ptq", ["/there/ptq.py"], "python -m benchmarks.ptq"),
    ],
)
def test_the_command_is_what_a_shell_takes(module, argv, expected, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None if module is None else SimpleNamespace(name=module))
    monkeypatch.setattr(sys, "argv", argv)
    assert origin.command() == expected


def test_the_hardware_is_the_processor_with_its_cores_or_the_gpu(monkeypatch):
    assert origin.hardware(torch.device("cpu")) == f"{origin.cpu_model()}, {origin.cores()} cores"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert origin.hardware(torch.device("cuda:1")) == "GPU 1"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert origin.commit() is None
