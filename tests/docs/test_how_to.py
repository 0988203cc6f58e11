"""The examples of the how-to pages run in order."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "blocks"), [("detection.md", 2), ("fpga.md", 1)])
def test_the_examples_run_in_order(page: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert len(code) == blocks
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        for block in code:
            exec(compile(block, page, "exec"), names)
    network = names["network"]
    assert isinstance(network, torch.nn.Module) and any("quantizer" in name for name, _ in network.named_modules())
