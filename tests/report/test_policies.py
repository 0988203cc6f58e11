from pathlib import Path

import pytest

from bitscape.policy import Policy
from bitscape.report.inputs import read_inputs
from bitscape.report.policies import caps_of, chosen, distinct, group_of, method_of
from tests.report.made import CAPS, policy, run, searched


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (searched(), "fisher"),
        (searched("3/3", "3/3", "uniform"), "uniform 3/3"),
        (searched("2/2", "3/3", "uniform"), "uniform 2/2 and 3/3"),
        (policy("4/4", "4/4"), "uniform 4/4"),
        (policy(), "method not recorded"),
        (policy(method=["odd"]), "method not recorded"),
        (policy(method="random"), "random"),
    ],
)
def test_methods_are_called_as_the_policy_tells(found: Policy, name: str) -> None:
    assert method_of(found) == name


def test_equal_bits_are_one_policy_and_the_first_searched_one_is_chosen(tmp_path: Path) -> None:
    searched("3/3", "3/3", "uniform").save(tmp_path / "uniform.json")
    searched().save(tmp_path / "fisher.json")
    folders = [run(tmp_path / f"run{at}", policy=searched()) for at in range(2)]
    found = distinct(read_inputs([tmp_path / "uniform.json", tmp_path / "fisher.json", *folders]))
    assert [each.names for each in found] == [("uniform.json",), ("fisher.json", "run0", "run1")]
    assert chosen(found) is found[1]
    assert chosen(found[:1]) is found[0]
    assert chosen(()) is None


def test_a_float_run_and_one_that_has_not_ended_are_called_so(tmp_path: Path) -> None:
    unfinished = run(tmp_path / "b", policy=policy())
    (unfinished / "policy.json").unlink()
    read = read_inputs([run(tmp_path / "a"), unfinished]).runs
    assert [group_of(each) for each in read.values()] == ["float", "method not recorded"]


def test_caps_are_those_that_are_numbers_of_a_known_kind() -> None:
    assert caps_of(searched()) == CAPS
    assert caps_of(policy()) == caps_of(policy(budget="w3a3")) == {}
    assert caps_of(policy(budget={"bitops": True, "weight_bytes": "1kB", "other": 3, "mean_weight_bits": 4})) == {"mean_weight_bits": 4.0}
