import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

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
    images = DIGITS.apply(dataset.images[:64])
    loader = DataLoader(TensorDataset(images, dataset.labels[:64]), batch_size=16, shuffle=True)
    names = {"model": model, "images": images, "loader": loader, "test_loader": loader}
    code = python_blocks()
    first = [line for line in code[0].splitlines() if line and not line.startswith("#")]
    assert len(first) == 4  # budget, policy, quantized network, file
    assert sum(block.count("epochs=30") for block in code) == 1
    for block in code:
        exec(compile(block.replace("epochs=30", "epochs=1"), str(README), "exec"), names)
    assert (tmp_path / "network.safetensors").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    with torch.no_grad():
        assert names["network"].eval()(names["images"]).shape == (64, 10)
