"""The examples of docs/own-loop.md run as they are printed; those of packages that are not installed are skipped."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

PAGE = Path(__file__).parents[2] / "docs" / "own-loop.md"
EXAMPLES = re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
NEEDS = {"Plain PyTorch": None, "accelerate": "accelerate", "Lightning": "lightning", "Hugging Face Trainer": "transformers"}


def test_there_is_an_example_for_each_kind_of_loop() -> None:
    assert [title for title, _ in EXAMPLES] == list(NEEDS)
    assert all(code.count("saq.ascent():") == code.count("bs.Saq().attach(") == 1 for _, code in EXAMPLES)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of other packages are none of ours
@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_the_example_runs_and_leaves_a_packed_network(
    title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = NEEDS[title]
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, str(PAGE), "exec"), names)
    model, network = (names.get("body", names.get("model")), getattr(names["network"], "body", names["network"]))
    assert not any(torch.equal(value, network.get_parameter(name)) for name, value in model.named_parameters() if name != "0.bias")
    with safe_open(tmp_path / "network.safetensors", "pt") as file:
        assert file.keys()
