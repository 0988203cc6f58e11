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


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        (None, [""]),
        (None, ["-", "a"]),
        (None, ["-c", "a"]),
        ("ipykernel_launcher", ["/there/ipykernel_launcher.py", "-f", "kernel.json"]),
        ("ipykernel.__main__", ["/there/ipykernel/__main__.py"]),
    ],
)
def test_what_a_shell_cannot_start_again_has_no_command(module, argv, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None if module is None else SimpleNamespace(name=module))
    monkeypatch.setattr(sys, "argv", argv)
    assert origin.command() is None


def test_code_given_to_python_has_no_command():
    code = "from bitscape.engine import origin; print(origin.command())"
    assert subprocess.run([sys.executable, "-c", code, "a"], capture_output=True, text=True, check=True).stdout == "None\n"


@pytest.mark.parametrize(
    ("size", "here", "argv", "expected"),
    [
        (2, "2", ["/bin/bitscape", "train"], "torchrun --nproc-per-node 2 --no-python bitscape train"),
        (2, "2", ["train.py"], "torchrun --nproc-per-node 2 --no-python python train.py"),
        (8, "4", ["/bin/bitscape", "train"], "torchrun --nproc-per-node 4 --nnodes 2 --no-python bitscape train"),
        (1, "1", ["/bin/bitscape", "train"], "bitscape train"),
        (2, None, ["/bin/bitscape", "train"], "bitscape train"),  # not by torchrun
    ],
)
def test_the_command_of_workers_starts_them_all(size, here, argv, expected, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(origin.workers, "world_size", lambda: size)
    if here is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert origin.command() == expected


def test_the_hardware_is_the_processor_with_its_cores_or_the_gpu(monkeypatch):
    assert origin.hardware(torch.device("cpu")) == f"{origin.cpu_model()}, {origin.cores()} cores"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert origin.hardware(torch.device("cuda:1")) == "GPU 1"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert origin.commit() is None
