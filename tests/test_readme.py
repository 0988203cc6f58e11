import re
from pathlib import Path

import pytest
import torch

from bitscape.data.batches import DIGITS
from bitscape.data.sources import load_dataset
from bitscape.models.digits import digits_net

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_digits")]

README = Path(__file__).parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_python_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = digits_net().eval()
    names = {"model": model, "dataset": dataset, "normalization": DIGITS, "images": DIGITS.apply(dataset.images[:64])}
    code = python_blocks()
    assert sum(block.count("epochs=30") for block in code) == 1
    for block in code:
        exec(compile(block.replace("epochs=30", "epochs=1"), str(README), "exec"), names)
    assert (tmp_path / "network.safetensors").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    with torch.no_grad():
        assert names["network"].eval()(names["images"]).shape == (64, 10)
