from pathlib import Path

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.folders import DYNAMIC_FILE, POLICY_FILE, TIERS_FILE, WEIGHTS_FILE
from bitscape.models.find import load_weights
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.storage import load_static, save_static


@pytest.mark.parametrize("victim", ["bitscape.policy.Policy.save", "bitscape.quant.storage.save_weights"])
def test_weights_are_never_seen_beside_another_policy(victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    old, new = (Policy({"": LayerBits(bits, 8)}) for bits in (8, 2))
    save_static(torch.nn.Linear(2, 2).state_dict(), old, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(victim, killed)
        with pytest.raises(KeyboardInterrupt):
            save_static(torch.nn.Linear(2, 2).state_dict(), new, tmp_path)
    assert not (tmp_path / WEIGHTS_FILE).exists()
    network, loaded = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    save_static(network.state_dict(), new, tmp_path)
    load_weights(loaded, tmp_path / WEIGHTS_FILE)
    assert torch.equal(loaded.weight, network.weight) and Policy.load(tmp_path / POLICY_FILE) == new


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


IMAGES = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_quantized_network_comes_back_with_its_policy(tmp_path: Path) -> None:
    policy = uniform_policy(["0", "3"], LayerBits(4, 8))
    saved = calibrate(with_quantizers(network(), policy), IMAGES).train()
    save_static(saved.state_dict(), policy, tmp_path)
    loaded, same = load_static(network(), tmp_path)
    assert same == policy and not loaded.training
    assert torch.equal(loaded(IMAGES), saved.eval()(IMAGES))


def test_a_float_network_has_no_policy(tmp_path: Path) -> None:
    saved = network()
    with torch.no_grad():
        saved[0].bias.add_(1)
    save_static(saved.state_dict(), None, tmp_path)
    loaded, policy = load_static(network(), tmp_path)
    assert policy is None and torch.equal(loaded(IMAGES), saved(IMAGES))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (DYNAMIC_FILE, "bits depend on the image; make static networks of it: bitscape tiers"),
        (TIERS_FILE, r"it holds several networks; name one of them, e.g. .*tier1"),
        ("run.json", "no model.safetensors; train to the end"),
    ],
)
def test_folders_of_other_kinds_are_refused(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(BitscapeError, match=message):
        load_static(network(), tmp_path)
