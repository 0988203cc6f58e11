import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from benchmarks import transfer_policies
from benchmarks.transfer_summaries import asga_ladder as ladder_table
from benchmarks.transfer_summaries import heat_map, transfer_scores
from benchmarks.transfer_summaries import seam_margins as margins_table
from benchmarks.transfer_summaries import transfer_policies as policies_table


def test_every_planned_proxy_can_be_drawn() -> None:
    for run in transfer_policies.wanted(3, 10_000, 2):
        case = transfer_policies.CASES[run["network"]]
        own = (None, case.target, *(f"{case.target}:{count}" for count in case.own))
        assert run["proxy"] in (*own, *case.foreign)


def policy_run(method: str, proxy: str | None, seed: int, top1: float, search_s: float, variant: str = "") -> dict[str, Any]:
    return {
        "network": "n",
        "target": "t",
        "method": method,
        "variant": variant,
        "proxy": proxy,
        "settings": {"budget": "w2a3", "images": 10},
        "budget": {"bitops": 2e6},
        "epochs": 2,
        "seed": seed,
        "top1": top1,
        "float_top1": 91.0,
        "search_s": search_s,
        "extra": {"before_training_top1": 10.0},
    }


def line_of(table: str, start: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_searches_are_compared_with_the_best_uniform_row_and_with_the_whole_target() -> None:
    runs = [policy_run("uniform", None, seed, 80.0 + seed, 0.0, "one width") for seed in range(2)]
    runs += [policy_run("uniform", None, seed, 70.0, 0.0, "two widths") for seed in range(2)]
    runs += [policy_run("seam", "t:5", seed, 82.0 + seed, 4.0) for seed in range(2)]
    runs += [policy_run("seam", "t", seed, 82.5 + seed, 100.0) for seed in range(2)]
    runs += [policy_run("asga", "t:5", 0, 79.0, 4.0)]
    table = policies_table(runs)
    assert "**n on t, BitOps of w2a3, 2.0 M**; 10 images an epoch, epochs: 2, float 91.0 %" in table
    assert line_of(table, "| uniform | one width")[-2:] == ["the best uniform row", "-"]
    seam = line_of(table, "| seam |  | t:5")
    assert seam[3] == "82.50 ± 0.71"
    assert seam[-2].startswith("+2.00 [+2.00, +2.00]")
    assert seam[-1].startswith("-0.50 [-0.50, -0.50]")
    assert seam[-1].endswith("; 1/25")
    assert line_of(table, "| seam |  | t |")[-1] == "-"
    assert line_of(table, "| asga")[-1] == "-"


def ladder_run(variant: str, seed: int, losses: list[float], top1: float) -> dict[str, Any]:
    extra = {"gap": 0.1, "curvature": 80.0, "trace": [{"loss": loss} for loss in losses]}
    return {"method": "asga", "variant": variant, "seed": seed, "top1": top1, "search_s": 3.0, "extra": extra}


def test_the_ladder_counts_epochs_to_the_base_of_the_same_seed() -> None:
    runs = [ladder_run("base", 0, [3.0, 2.0], 80.0), ladder_run("base", 1, [3.0, 1.0], 81.0)]
    runs += [ladder_run("+ SAM", 0, [2.0, 1.5], 81.0), ladder_run("+ SAM", 1, [2.0, 1.5], 82.0)]
    table = ladder_table(runs)
    assert line_of(table, "| base")[4] == "2.0 ± 0.0"
    sam = line_of(table, "| + SAM")
    assert sam[4] == "1.0 (n=1)"  # the second seed never got there
    assert sam[3] == "1.500 ± 0.000"
    assert sam[-1].startswith("+1.00 [+1.00, +1.00]")


def test_margins_stand_in_a_table_for_each_length_of_training() -> None:
    def run(epochs: int, margin: float) -> dict[str, Any]:
        return {"method": "seam", "variant": "", "epochs": epochs, "seed": 0, "extra": {"margin": {"target": margin, "own": 0.5}}}

    table = margins_table([run(0, 0.25), run(2, 0.75)])
    before, after = table.split("**Trained, epochs: 2**")
    assert "Calibrated, not trained" in before
    assert line_of(before, "| seam")[2:4] == ["0.250", "0.500"]
    assert line_of(after, "| seam")[2] == "0.750"


def score_run(method: str, proxy: str | None, scores: list[list[float]], policy: list[int], top1: float) -> dict[str, Any]:
    extra: dict[str, Any] = {"loss": 100 - top1}
    if scores:
        extra |= {"candidates": ["2/2", "4/4"], "scores": dict(zip("ab", scores, strict=True))}
    bits = {name: [width, width] for name, width in zip("ab", policy, strict=True)}
    return {
        "network": "net",
        "method": method,
        "variant": None,
        "proxy": proxy,
        "seed": int(top1),
        "epochs": 0,
        "policy": bits,
        "top1": top1,
        "extra": extra,
    }


@pytest.fixture
def scored() -> list[dict[str, Any]]:
    accuracies = ([2, 2], 10.0), ([2, 4], 20.0), ([4, 2], 30.0), ([4, 4], 40.0)
    runs = [score_run("random", None, [], policy, top1) for policy, top1 in accuracies]
    right, wrong = [[3.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]]
    return [*runs, score_run("fisher", None, right, [4, 4], 40.0), score_run("fisher", "noise:8", wrong, [2, 4], 20.0)]


def test_scores_are_tabled_by_proxy_with_the_policies_they_find(scored: list[dict[str, Any]]) -> None:
    table = transfer_scores(scored)
    ranked, own = table.split("the policy that each score finds itself")
    assert "4 random policies of one cost, without training" in ranked
    correlations = line_of(ranked, "| fisher")
    assert correlations[1].startswith("1.00 [")
    assert correlations[2].startswith("-1.00 [")
    assert line_of(own, "| fisher") == ["fisher", "40.0; 100%", "20.0; 50%"]


def test_the_figure_is_xml_that_shows_every_correlation(scored: list[dict[str, Any]]) -> None:
    drawn = heat_map(scored)
    assert drawn == heat_map(scored)
    texts = [element.text for element in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"1.00", "-1.00", "fisher", "target's own", "noise"} <= set(texts)
