import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from bitscape.engine import CheckpointError, checkpoint
from bitscape.engine.checkpoint import check_same_settings, check_same_tensors, load_checkpoint, save_checkpoint
from bitscape.engine.state import RunState
from bitscape.files import UNSEALED, sealed

ONE = {"a": torch.zeros(1)}
"""A tensor, for safetensors 0.4.3 reads no file without one."""


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    tied = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {"a": tied, "b": tied, "scalar": torch.tensor(3), "flag": torch.tensor(True), "none": torch.zeros(0)}
    save_checkpoint(path, tensors, {"epoch": 3})
    loaded, header = load_checkpoint(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert header == {"format": 1, "epoch": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.randn(100)}, {})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"truncated or damaged.*start over in another folder$"):
        load_checkpoint(path)


def test_a_changed_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"rng.cpu": torch.arange(4), "model.weight": torch.randn(3, 4)}, {"epoch": 3, "settings": {"lr": 0.1}})
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=str(path)):
            load_checkpoint(path)


def test_another_format_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, ONE, {"format": 99})
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        load_checkpoint(path)
    header = json.dumps({"__metadata__": {"bitscape": "{not json"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_differences_are_named() -> None:
    path = Path("c")
    one = {"conv.weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    check_same_tensors(path, one, dict(one), "model")
    with pytest.raises(CheckpointError, match=r"conv1.weight is missing from the checkpoint; nearest: conv.weight"):
        check_same_tensors(path, one, {"conv1.weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "model")
    with pytest.raises(CheckpointError, match=r"bias has shape \(2,\), the model \(5,\)"):
        check_same_tensors(path, one, {**one, "bias": torch.zeros(5)}, "model")
    check_same_settings(path, {"a": {"lr": 1.0}}, {"a": {"lr": 1.0}})
    with pytest.raises(CheckpointError, match=r"a.lr was 1.0 and is 2.0; b was 'absent' and is None"):
        check_same_settings(path, {"a": {"lr": 1.0}}, {"a": {"lr": 2.0}, "b": None})


COUNTS = '"batch": 0, "steps": 0, "images": 0, "train_s": 0, "records": []}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, CHECKSUM, "a": ' + "[" * 100_000, "truncated or damaged .*recursion"),
        ("[1, {CHECKSUM}]", "truncated or damaged .its header is no JSON object"),
        ('{"format": 1, CHECKSUM}', "does not hold what a run needs .KeyError"),
        ('{"format": 1, CHECKSUM, "settings": {}, "epoch": 1, ' + COUNTS, "one record for each epoch"),
        ('{"format": 1, CHECKSUM, "settings": {}, "epoch": -1, ' + COUNTS, "whole numbers from 0"),
    ],
)
def test_a_header_that_another_program_wrote_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(sealed(save(ONE, {"bitscape": text.replace("CHECKSUM", f'"checksum": "{UNSEALED}"')})))
    parts: Any = {name: SimpleNamespace() for name in ("optimizer", "rates", "step", "task")}
    state = RunState(model=torch.nn.ReLU(), ema=None, settings={}, device=torch.device("cpu"), **parts)
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        state.restore(path)


def test_only_the_differences_that_are_told_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(checkpoint, "nearest", lambda name, options: looked_up.append(name) or "")
    saved = {f"layer{at}.weight": torch.zeros(0) for at in range(10_000)}
    with pytest.raises(CheckpointError, match=r"layer4\.weight is not in the model \(and 9995 more\)"):
        check_same_tensors(Path("c"), saved, {}, "model")
    assert looked_up == [f"layer{at}.weight" for at in range(5)]
