from pathlib import Path

import pytest
import torch

from bitscape.folders import POLICY_FILE, WEIGHTS_FILE
from bitscape.models.find import load_weights
from bitscape.policy import LayerBits, Policy
from bitscape.quant.storage import save_static


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
