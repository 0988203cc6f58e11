import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.searches.front import Front, FrontPoint


def policy(bits: int, score: float) -> Policy:
    cost = {"bitops": 100.0 * bits, "mean_weight_bits": bits, "mean_activation_bits": bits}
    return Policy({"a": LayerBits(bits, bits)}, None, cost, {"score": score})


FRONT = Front(kind="bitops", method="fisher", policies=(policy(2, 3.0), policy(4, 0.5)))


def test_points_are_costs_and_scores_of_the_policies() -> None:
    assert FRONT.points == (FrontPoint(200.0, 3.0, FRONT.policies[0]), FrontPoint(400.0, 0.5, FRONT.policies[1]))


def test_a_front_prints_as_a_table() -> None:
    assert repr(FRONT).splitlines() == [
        "Front along bitops: 2 points",
        "bitops  score (fisher)  mean weight bits  mean activation bits",
        "   200               3             2.000                 2.000",
        "   400             0.5             4.000                 4.000",
    ]


@pytest.mark.parametrize(("offset", "scale"), [(0.0, "log"), (-1.0, "linear")])
def test_a_front_is_drawn_with_the_policy_that_was_returned(offset: float, scale: str) -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    front = replace(FRONT, policies=(policy(2, 3.0), policy(4, 0.5 + offset)))
    assert front.with_chosen(policy(3, 2.0)).plot(axes) is axes
    line, chosen = axes.get_lines()
    assert line.get_xydata().tolist() == [[200.0, 3.0], [400.0, 0.5 + offset]] and chosen.get_xydata().tolist() == [[300.0, 2.0]]
    assert axes.get_yscale() == scale and axes.get_xlabel() == "BitOps"


def small_network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def searched(budget: str, method: str = "local", **changes: Any) -> bs.SearchResult:
    images = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return bs.search(small_network(), images, budget, method=method, pinned={}, **changes)


@pytest.mark.parametrize("budget", ["weight_bytes=w4", "bitops=w4a4", "mean_weight_bits=4"])
def test_the_front_of_a_result_is_that_of_its_scores_along_the_first_cap(budget: str) -> None:
    result = searched(budget)
    kind = budget.partition("=")[0]
    cap = result.policy.provenance["budget"][kind]
    front, scores = result.front, result.scores
    assert scores is not None and (front.kind, front.method, front.chosen) == (kind, "local", result.policy)
    assert result.front is front  # solved once
    costs, totals = [p.cost for p in front.points], [p.score for p in front.points]
    assert costs == sorted(costs) and totals == sorted(totals, reverse=True) and len(costs) > 3
    assert totals[-1] == pytest.approx(scores.values.min(1).sum())
    within = [point.score for point in front.points if point.cost <= cap]
    assert min(within) >= result.policy.provenance["score"] * (1 - 1e-9)  # the best within the cap
    assert pickle.loads(pickle.dumps(result)).front.points == front.points


def test_the_front_keeps_pinned_and_tied_layers() -> None:
    result = searched("weight_bytes=w4", tied=[("3", "5")])
    assert all(point.policy.layers["3"] == point.policy.layers["5"] for point in result.front.points)
    pinned = bs.search(small_network(), torch.zeros(4, 3, 2, 2) + torch.arange(4)[:, None, None, None], "weight_bytes=0.9x", method="local")
    assert {point.policy.layers["1"] for point in pinned.front.points} == {LayerBits(8, 8)}


def test_a_method_without_scores_has_no_front() -> None:
    with pytest.raises(BitscapeError, match=r"front: method uniform has no scores, .*use a method that scores, such as fisher"):
        _ = searched("weight_bytes=w4", "uniform").front


def test_a_result_prints_its_policy_beside_the_budget() -> None:
    result = searched("weight_bytes=w4")
    lines = repr(result).splitlines()
    assert re.fullmatch(r"SearchResult: 3 layers, local, \d+\.\d s", lines[0]) and lines[1].split()[0] == "layer"
    assert [line.split() for line in lines[2:5]] == [[name, str(b.weight), str(b.activation)] for name, b in result.policy.layers.items()]
    cap = result.policy.provenance["budget"]["weight_bytes"]
    assert f"weight_bytes {result.policy.cost['weight_bytes']:.4g} B (at most {cap:.4g} B)" in lines[5] and len(lines) == 6
    assert "<table>" in result._repr_html_()
