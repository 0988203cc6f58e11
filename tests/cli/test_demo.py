import re

import pytest

from bitscape.cli.demo import _compared
from bitscape.cli.packed import packed_policy
from bitscape.policy import Policy

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("few_digits")
def test_goes_the_whole_way(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("bitscape.cli.demo.SEEDS", (0,))
    shown = cli("demo", "--out", tmp_path)
    assert "same, bit for bit" in shown.out
    rows = re.findall(r"^(float|fisher) .* ([0-9.]+)$", shown.out, re.M)
    assert packed_policy(tmp_path / "packed.safetensors") == Policy.load(tmp_path / "policy.json")
    command = re.search(r"^  bitscape (evaluate .*)$", shown.out, re.M)
    assert command
    packed = command.group(1).split()
    weights = [*packed[: packed.index("--packed")], "--weights", tmp_path / "model.safetensors"]
    assert rows == [("float", _top1(cli(*weights).out)), ("fisher", _top1(cli(*packed).out))]


def _top1(printed):
    found = re.match(r"top-1 ([0-9.]+) %", printed)
    assert found
    return found.group(1)


def test_says_what_the_test_set_can_show():
    assert "no difference that this test set can show" in _compared("trained", 98.0, 98.5, 360)
    assert "mixed bits are better" in _compared("trained", 90.0, 97.0, 360)
    assert "mixed bits are worse" in _compared("trained", 97.0, 90.0, 360)
