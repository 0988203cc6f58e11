import json
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dqmq
from benchmarks.dqmq import ACTIVATIONS, BUDGETS, LEARNED, LONGER, RANDOM, STATIC, UNIFORM, VARIANTS, RandomBits
from benchmarks.dqmq_summaries import dqmq as tables
from benchmarks.dqmq_summaries import figure
from bitscape.cost.policy_cost import policy_cost
from bitscape.data.corruptions import HELD_OUT, TRAINED, Quality
from bitscape.data.sources import Dataset
from bitscape.dynamic import DynamicBits, DynamicNetwork
from bitscape.dynamic.decision import Decision
from bitscape.engine import Batch
from bitscape.engine.step import CrossEntropy
from bitscape.policy import LayerBits
from bitscape.report.records import FIELDS
from recipes.networks import WEIGHTS
from tests.benchmarks.test_transfer_summaries import line_of
from tests.dynamic.small import dynamic, mixed_images

RIGHT = [[1.0, 5.0], [3.0, 6.0], [4.0, 10.0]]
SPENT = [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]
"""Images right and BitOps, for three shifts and two severities."""


@pytest.mark.parametrize(
    ("limit", "pick"),
    [(2, (0, 0)), (3, (1, 0)), (4, (1, 1)), (5, (0, 2)), (6, (1, 2)), (7, (1, 2)), (8, (2, 2)), (100, (2, 2))],
)
def test_the_oracle_takes_most_right_images_within_the_limit(limit: float, pick: tuple[int, ...]) -> None:
    # right, by shifts: 00 6, 01 7, 02 11, 10 8, 11 9, 12 13, 20 9, 21 10, 22 14; cost: 2, 3, 5, 3, 4, 6, 5, 6, 8
    assert dqmq.chosen(RIGHT, SPENT, limit) == pick


def test_the_oracle_leaves_bits_unused_that_cost_accuracy() -> None:
    assert dqmq.chosen([[5.0], [3.0]], [[1.0], [2.0]], 10) == (0,)


def key_of(run: dict[str, Any]) -> tuple[str, str]:
    return run["method"], run["variant"]


@pytest.mark.parametrize("variants", [False, True])
def test_every_wanted_run_is_done_by_its_own_part_of_the_script(variants: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("static", "learned", "random_bits"):
        monkeypatch.setattr(dqmq, name, lambda run, name=name: {"extra": name})
    monkeypatch.setattr(dqmq, "limit_of", lambda run: 1.0)
    monkeypatch.setattr(dqmq, "tests", lambda: ([0], None))
    parts = {UNIFORM: "static", LONGER: "static", STATIC: "static", ACTIVATIONS: "static", LEARNED: "learned", RANDOM: "random_bits"}
    for run in dqmq.wanted(2, 10_000, 2, variants):
        done = dqmq.measure(run)
        assert done["extra"] == ("learned" if variants else parts[key_of(run)])
        assert set(done) <= set(FIELDS) and run.items() <= done.items()


def test_random_bits_come_after_the_network_whose_bits_they_draw() -> None:
    plan = list(dqmq.wanted(3, 10_000, 2, variants=False))
    assert {key_of(run) for run in plan} == {LEARNED, UNIFORM, LONGER, STATIC, RANDOM, ACTIVATIONS}
    assert len(plan) == 3 * len(BUDGETS) * 6
    assert {run["epochs"] for run in plan if key_of(run) == LONGER} == {4}
    for at, run in enumerate(plan):
        if key_of(run) == RANDOM:
            assert plan.index({**run, "method": LEARNED[0], "variant": LEARNED[1]}) < at


def test_variants_are_done_with_the_flag_alone() -> None:
    variants = list(dqmq.wanted(3, 10_000, 2, variants=True))
    assert [key_of(run) for run in variants] == [("dqmq", name) for name in VARIANTS if name]
    assert {(run["settings"]["budget"], run["seed"]) for run in variants} == {("w3a3", 1)}
    assert not {key_of(run) for run in dqmq.wanted(3, 10_000, 2, variants=False)} & {key_of(run) for run in variants}


def test_layers_of_the_first_stage_are_the_network_s() -> None:
    names = [name for name, layer in WEIGHTS["resnet20"].build().named_modules() if hasattr(layer, "weight")]
    assert set(dqmq.FIRST_STAGE) <= set(names) and len(set(dqmq.FIRST_STAGE)) == 8


@pytest.mark.parametrize(("budget", "weight", "widths"), [("w3a3", 3, range(2, 9)), ("w4a4", 4, range(2, 9)), ("w3a2", 3, range(1, 9))])
def test_static_activations_choose_from_the_widths_of_dqmq(budget: str, weight: int, widths: range) -> None:
    run = {"method": ACTIVATIONS[0], "variant": ACTIVATIONS[1], "settings": {"budget": budget}}
    assert dqmq.candidates(run) == tuple(LayerBits(weight, width) for width in widths)


@pytest.mark.parametrize(("budget", "widths"), [("w3a3", range(2, 7)), ("w4a4", range(2, 7)), ("w3a2", range(1, 7))])
def test_static_policies_choose_from_all_pairs(budget: str, widths: range) -> None:
    found = dqmq.candidates({"method": STATIC[0], "variant": STATIC[1], "settings": {"budget": budget}})
    assert sorted((bits.weight, bits.activation) for bits in found) == list(product(range(2, 7), widths))


STATIC_SHARE = [0.0] * 6 + [1.0]
"""8 bits, of widths from 2 to 8."""


def share_of(width: int, low: int = 2) -> list[float]:
    return [float(each == width) for each in range(low, 9)]


@pytest.fixture(scope="module")
def network() -> DynamicNetwork:
    return dynamic()


def test_random_bits_that_have_no_choice_are_these_bits(network: DynamicNetwork) -> None:
    # The outer layers are static: what the marginals say of them does not matter.
    drawn = RandomBits([share_of(2), share_of(5), share_of(3), share_of(2)]).drawn(network, 7)
    assert drawn.activation.tolist() == [[8.0, 5.0, 3.0, 8.0]] * 7
    assert drawn.weight.tolist() == [[8.0, 4.0, 4.0, 8.0]] * 7


def test_random_bits_are_what_training_runs_at() -> None:
    network = dynamic().train()
    step = RandomBits([STATIC_SHARE, share_of(5), share_of(3), STATIC_SHARE])
    step(network, Batch.of(mixed_images(4), torch.tensor([0, 1, 2, 3]), CrossEntropy()))
    assert network.decision.activation.tolist() == [[8.0, 5.0, 3.0, 8.0]] * 4
    weights = {name: value.grad for name, value in network.model.named_parameters() if name.endswith("weight")}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in weights.values())
    assert all(value.grad is None for value in network.heads.parameters())


def test_random_bits_fall_as_often_as_the_marginals_say_and_apart_from_each_other(network: DynamicNetwork) -> None:
    shares = [STATIC_SHARE, [0.1, 0.2, 0.0, 0.4, 0.0, 0.0, 0.3], [0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0], STATIC_SHARE]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        drawn = RandomBits(shares).drawn(network, 4000)
    for found, share in zip(dqmq.marginals(drawn, network.bits), shares, strict=True):
        assert [each for each, said in zip(found, share, strict=True) if said == 0] == [0.0] * share.count(0.0)
        assert found == pytest.approx(share, abs=0.032)  # four deviations of a share of a half over 4000 images
    both = (drawn.activation[:, 1] == 5) & (drawn.activation[:, 2] == 2)
    assert float(both.float().mean()) == pytest.approx(0.4 * 0.5, abs=0.026)


def test_marginals_are_the_shares_of_images_at_each_width() -> None:
    activation = torch.tensor([[2.0, 8.0], [4.0, 8.0], [4.0, 8.0], [3.0, 8.0]])
    found = dqmq.marginals(Decision(torch.full_like(activation, 3.0), activation), DynamicBits())
    assert found == [[0.25, 0.25, 0.5, 0.0, 0.0, 0.0, 0.0], STATIC_SHARE]
    assert dqmq.marginals(Decision(activation, activation), DynamicBits(low=1))[1] == [0.0, *STATIC_SHARE]


def test_random_bits_are_those_of_the_learned_network_of_the_same_budget_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"network": "resnet20", "method": RANDOM[0], "variant": RANDOM[1], "settings": {"budget": "w3a2", "images": 9}}
    run |= {"epochs": 2, "seed": 1}
    own, other = ([share_of(8, low=1), share_of(width, low=1), share_of(1, low=1), share_of(8, low=1)] for width in (5, 7))
    twin = {**run, "method": LEARNED[0], "variant": LEARNED[1]}
    others = [
        {"seed": 2},
        {"epochs": 3},
        {"variant": "gumbel-softmax"},
        {"settings": {"budget": "w3a3", "images": 9}},
        {"method": RANDOM[0]},
    ]
    lines = [{**twin, "extra": {"marginals": own}}, *({**twin, **each, "extra": {"marginals": other}} for each in others)]
    (tmp_path / "dqmq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    made: list[DynamicNetwork] = []
    trained: list[RandomBits] = []
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    data = Dataset("six", pixels, torch.tensor([0, 1, 2, 3, 0, 1]), tuple("abcd"))
    clean = Quality(("clean",), torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
    monkeypatch.setattr(dqmq, "RESULTS", tmp_path)
    monkeypatch.setattr(dqmq, "tests", lambda: (data, clean))
    monkeypatch.setattr(dqmq, "made", lambda run, bits: made.append(dynamic(bits)) or made[-1])
    monkeypatch.setattr(dqmq, "trained", lambda network, run, step, optimizer: trained.append(step) or 3.0)
    with torch.random.fork_rng([]):
        found = dqmq.random_bits(run)

    assert [step.marginals for step in trained] == [own] and made[0].bits.low == 1
    drawn = torch.tensor([[8.0, 5.0, 1.0, 8.0]]).expand(6, -1)
    decision = Decision(torch.tensor([[8.0, 4.0, 4.0, 8.0]]).expand(6, -1), drawn)
    cost = policy_cost(made[0].cost, made[0].policy(decision[:1]))
    assert found["cost"]["bitops"] == pytest.approx(cost["bitops"] + made[0].decision_bitops, rel=1e-6)
    assert found["cost"]["mean_activation_bits"] == pytest.approx(cost["mean_activation_bits"], rel=1e-6)
    with torch.no_grad(), made[0].using(decision):
        guesses = made[0](dqmq.normalized(data)).argmax(1)
    assert found["top1"] == found["extra"]["clean"] == pytest.approx(100 * float((guesses == data.labels).float().mean()))
    assert found["train_s"] == 3.0


def test_results_are_split_by_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("clean", TRAINED[4], HELD_OUT[0])
    corruption, severity = torch.tensor([0, 1, 1, 2, 0, 1, 2, 2]), torch.tensor([0, 1, 5, 3, 0, 1, 3, 3])
    monkeypatch.setattr(dqmq, "tests", lambda: (None, Quality(names, corruption, severity)))
    hits = torch.tensor([1, 1, 0, 0, 0, 1, 1, 0]).bool()
    bits = torch.tensor([2.0, 3.0, 6.0, 4.0, 2.5, 3.5, 5.0, 6.0])
    found = dqmq.by_quality(hits, bits)
    assert found["cells"] == {
        "clean": {"0": {"top1": 50.0, "images": 2, "bits": 2.25}},
        "contrast": {"1": {"top1": 100.0, "images": 2, "bits": 3.25}, "5": {"top1": 0.0, "images": 1, "bits": 6.0}},
        "shot_noise": {"3": {"top1": pytest.approx(100 / 3), "images": 3, "bits": 5.0}},
    }
    parts = {name: found[name] for name in ("clean", "seen", "held_out")}
    assert parts == {"clean": 50.0, "seen": pytest.approx(200 / 3), "held_out": pytest.approx(100 / 3)}
    static = dqmq.by_quality(hits)
    assert static["cells"]["contrast"]["5"] == {"top1": 0.0, "images": 1}
    assert {name: static[name] for name in parts} == parts


LIMIT = 2e6


def record(key: tuple[str, str], seed: int, top1: float, *, share: float = 1.0, **changed: Any) -> dict[str, Any]:
    run = {
        "network": "resnet20",
        "target": "t",
        "method": key[0],
        "variant": key[1],
        "settings": {"budget": changed.pop("budget", "w3a3"), "images": changed.pop("images", 10_000)},
        "epochs": changed.pop("epochs", 2),
        "seed": seed,
        "top1": top1,
        "float_top1": 91.0,
        "budget": {"bitops": LIMIT},
        "cost": {"bitops": share * LIMIT, "mean_activation_bits": 3.5},
        "train_s": 60.0,
    }
    return {**run, "extra": {"clean": top1 + 5, "seen": top1 - 1, "held_out": top1 - 9, **changed}}


def learned(seed: int, top1: float, *, bits: float = 3.0, same_network: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """Its cells: clean, and two corruptions in an order that is not the benchmark's."""

    def cell(top1: float, bits: float) -> dict[str, float]:
        return {"top1": top1, "images": 100, "bits": bits}

    cells = {"clean": {"0": cell(top1 + 5, bits)}, "jpeg": {"2": cell(top1 - 20, bits + 1)}, "shot_noise": {"5": cell(top1 - 30, bits + 2)}}
    return record(LEARNED, seed, top1, cells=cells, same_network=same_network or {}, **more)


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    found = []
    for seed in (1, 2):
        tiers = {"2 static tiers": 77.0 + seed, "2 static tiers, bitops": (0.4 + 0.1 * seed) * LIMIT}
        others = {"decisions of other images": 80.0 + seed, **tiers}
        found.append(learned(seed, 80.0 + seed, share=0.98 + 0.01 * seed, bits=2.0 + seed, same_network=others))
        found += [record(UNIFORM, seed, 78.0 + seed), record(STATIC, seed, 82.0 + seed), record(RANDOM, seed, 79.5 + seed, share=0.9)]
    return [*found, record(("dqmq", "gumbel-softmax"), 1, 84.0)]


def section(table: str, heading: str) -> str:
    """What follows the heading, up to the next."""
    return table.split(f"**{heading}**", 1)[1].split("\n\n**")[0]


def test_methods_are_compared_with_static_mixed_and_with_random_bits(runs: list[dict[str, Any]]) -> None:
    table = section(tables(runs), "resnet20 on t, mean BitOps of w3a3")
    assert "; 10,000 images of mixed quality, epochs: 2, float on clean images 91.0 %" in table
    own, fixed, drawn = (line_of(table, f"| {method} | {variant} |") for method, variant in (LEARNED, STATIC, RANDOM))
    assert own[2:8] == ["81.50 ± 0.71", "86.50 ± 0.71", "80.50 ± 0.71", "72.50 ± 0.71", "3.50 ± 0.00", "99.5 ± 0.7"]
    assert own[-2].startswith("-2.00 [-2.00, -2.00]") and own[-1].startswith("+0.50 [+0.50, +0.50]")
    assert fixed[-2] == "-" and fixed[-1].startswith("+2.50 [")
    assert drawn[-2].startswith("-2.50 [") and drawn[-1] == "-" and drawn[7] == "90.0 ± 0.0"
    assert line_of(table, "| dqmq | gumbel-softmax |")[-2:] == ["+1.00, one pair: no interval", "+3.50, one pair: no interval"]


def test_what_a_network_is_compared_with_may_be_missing(runs: list[dict[str, Any]]) -> None:
    table = tables([run for run in runs if key_of(run) not in (STATIC, RANDOM)])
    assert line_of(table, "| dqmq |  |")[-2:] == ["no seed in common"] * 2
    alone = tables([run for run in runs if key_of(run) == UNIFORM])
    assert section(alone, "The learned networks at w3a3, used otherwise").strip() == "no run yet"


def test_uses_of_one_network_are_rows_and_their_bitops_a_column(runs: list[dict[str, Any]]) -> None:
    table = section(tables(runs), "The learned networks at w3a3, used otherwise")
    assert ", bitops" not in table
    assert line_of(table, "| each image (dqmq)") == ["each image (dqmq)", "81.50", "99.5", "-"]
    assert line_of(table, "| decisions of other images")[1:] == ["81.50", "-", "+0.00 [+0.00, +0.00], no difference seen"]
    assert line_of(table, "| 2 static tiers")[1:] == ["78.50", "55.0", "-3.00 [-3.00, -3.00]"]
    assert len(table.strip().splitlines()) == 2 + 3


def test_bits_stand_by_corruption_and_severity(runs: list[dict[str, Any]]) -> None:
    table = tables(runs).split("**Mean activation bits that images get**")[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[-3:]]
    assert lines == [
        ["w3a3", "clean", "3.50", *[""] * 5],
        ["w3a3", "shot noise", *[""] * 5, "5.50"],
        ["w3a3", "jpeg", "", "", "4.50", "", "", ""],
    ]


@pytest.mark.parametrize("other", [{"epochs": 5}, {"images": 500}, {"budget": "w4a4"}])
def test_runs_of_other_recipes_are_not_mixed(runs: list[dict[str, Any]], other: dict[str, Any]) -> None:
    longer = [learned(seed, 50.0, bits=7.0, **other) for seed in (1, 2)]
    longer += [record(STATIC, seed, 20.0, **other) for seed in (1, 2)]
    first, second = (part.split("**The learned")[0] for part in tables(runs + longer).split("**resnet20 on t, mean BitOps of ")[1:])
    assert "**resnet20 on t, mean BitOps of " + first in tables(runs)
    assert line_of(second, "| dqmq |  |")[2] == "50.00 ± 0.00" and line_of(second, "| dqmq |  |")[-2].startswith("+30.00 [")
    bits = tables(runs + longer).split("**Mean activation bits")[1]
    assert bits.count("| 3.50 |") == bits.count("| 7.00 |") == 1


def test_the_figure_shows_the_learned_networks_of_the_first_group(runs: list[dict[str, Any]]) -> None:
    drawn = figure([*runs, learned(1, 50.0, bits=7.0, budget="w4a4")])
    assert drawn == figure(runs)
    texts = [element.text for element in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"clean", "shot noise", "jpeg", "86.5", "61.5", "51.5", "3.50", "4.50", "5.50"} <= set(texts)
    assert not {"55.0", "7.00"} & set(texts)
    assert texts[0] == "Top-1 86.50 % clean, 56.50 % in the mean of all corruptions"
