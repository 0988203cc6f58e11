import argparse
import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.find import load_weights


def _network() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))


def _prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


FORMS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best": 0.5},
    "with options": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "two": lambda state: {"model": {"state_dict": state}},
    "averaged beside it": lambda state: {"model_ema": {}, "model": state},
    "module.": lambda state: _prefixed(state, "module."),
    "module. in state_dict": lambda state: {"state_dict": _prefixed(state, "module.")},
    "compiled and parallel": lambda state: _prefixed(state, "module._orig_mod."),
    "averaged model": lambda state: {"n_averaged": torch.tensor(5), **_prefixed(state, "module.")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_what_torch_saved_loads(form, suffix, tmp_path: Path) -> None:
    source, target, path = _network(), _network(), tmp_path / f"w{suffix}"
    torch.save(FORMS[form](source.state_dict()), path, _use_new_zipfile_serialization=suffix != ".pth")
    load_weights(target, path)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_a_prefix_in_safetensors_is_left_out_too(tmp_path: Path) -> None:
    source, target = _network(), _network()
    save_file(_prefixed(source.state_dict(), "module."), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(source.conv.weight, target.conv.weight)


def test_the_entry_that_is_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"state_dict": _network().state_dict()}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="bitscape.models"):
        load_weights(_network(), tmp_path / "w.pt")
    assert caplog.messages == [f"{tmp_path / 'w.pt'}: using its entry 'state_dict'"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (_network(), r"holds more than tensors \(collections.OrderedDict|holds more than tensors \("),
        ({"epoch": 3, "optimizer": {"lr": 0.1}}, "holds epoch, optimizer; looked for a state dict"),
        ([torch.ones(2)], "holds list; save a state dict"),
        ({}, "holds nothing"),
        ({"state_dict": {"backbone.conv.weight": torch.ones(2, 1, 3, 3)}}, "does not fit the network; missing in the file: "),
    ],
)
def test_what_is_no_state_dict_of_the_network_is_named(document, message, tmp_path: Path) -> None:
    torch.save(document, tmp_path / "w.pt")
    with pytest.raises(BitscapeError, match=message):
        load_weights(_network(), tmp_path / "w.pt")


def test_a_document_that_holds_itself_is_named(tmp_path: Path) -> None:
    document: dict[str, object] = {"epoch": 3}
    document["state_dict"] = document
    torch.save(document, tmp_path / "w.pt")
    with pytest.raises(BitscapeError, match="holds epoch, state_dict; looked for a state dict"):
        load_weights(_network(), tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_message_does_not_repeat_how_to_run_a_file(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Identity(), torch.ones(1)), tmp_path / "w.pt")
    with pytest.raises(BitscapeError, match=r"cannot be read as weights \(.*\); save the weights alone") as refused:
        load_weights(_network(), tmp_path / "w.pt")
    assert "False" not in str(refused.value)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": _network().state_dict(), "x": Hostile()}, tmp_path / "w.pt")
    with pytest.raises(BitscapeError, match=r"holds more than tensors \(.*\), which is not loaded, for it could run code"):
        load_weights(_network(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut", b"\x80\x02 cut"])
def test_a_damaged_file_is_named(content, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(BitscapeError, match=r"w\.pt' cannot be read as weights"):
        load_weights(_network(), tmp_path / "w.pt")
