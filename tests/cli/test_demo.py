import re

import pytest

from bitscape.cli.demo import _compared
from bitscape.cli.packed import packed_policy
from bitscape.policy import Policy

pytestmark = pytest.mark.slow


def test_goes_the_whole_way(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("bitscape.cli.demo.SEEDS", (0,))
    shown = cli("demo", "--out", tmp_path)
    assert "same, bit for bit" in shown.out
    accuracies = [float(value) for value in re.findall(r"^(?:float|fisher) .* ([0-9.]+)$", shown.out, re.M)]
    assert len(accuracies) == 2
    assert min(accuracies) > 95
    assert packed_policy(tmp_path / "packed.safetensors") == Policy.load(tmp_path / "policy.json")
    command = re.search(r"^  bitscape (evaluate .*)$", shown.out, re.M)
    assert command
    assert "top-1" in cli(*command.group(1).split()).out


def test_says_what_the_test_set_can_show():
    assert "no difference that this test set can show" in _compared("trained", 98.0, 98.5, 360)
    assert "mixed bits are better" in _compared("trained", 90.0, 97.0, 360)
    assert "mixed bits are worse" in _compared("trained", 97.0, 90.0, 360)
