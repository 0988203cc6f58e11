"""The examples of the README and of docs/getting-started.md run as they are printed."""

import re
from pathlib import Path

import onnx
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bitscape.data.batches import DIGITS
from bitscape.data.sources import load_dataset
from bitscape.models.digits import digits_net

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_digits")]

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_example_of_the_readme_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (code,) = python_blocks("README.md")
    assert len([line for line in code.splitlines() if line and not re.match("import|from", line)]) == 5
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "README.md", "exec"), {})
    onnx.checker.check_model(tmp_path / "network.onnx")


def test_the_readme_is_one_screen_and_names_the_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert [name for name in ("make demo", "make check", "make test", "make site") if name not in text] == []


def test_the_python_of_the_first_steps_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = digits_net().eval()
    images = DIGITS.apply(dataset.images[:64])
    loader = DataLoader(TensorDataset(images, dataset.labels[:64]), batch_size=16, shuffle=True)
    names = {"model": model, "images": images, "loader": loader, "test_loader": loader}
    code = python_blocks("docs/getting-started.md")
    assert sum(block.count("epochs=30") for block in code) == 1
    for block in code:
        exec(compile(block.replace("epochs=30", "epochs=1"), "docs/getting-started.md", "exec"), names)
    assert (tmp_path / "network.safetensors").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    with torch.no_grad():
        assert names["network"].eval()(names["images"]).shape == (64, 10)
