"""The smallest policy within a drop: bisection over real evaluations, kept in a folder."""

import json

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.data.samples import Samples
from bitscape.searches.allocation import pareto_front
from bitscape.verbs import drop as drop_file
from bitscape.verbs.drop import POINTS
from tests.verbs.test_verbs import IMAGES, classifier

CANDIDATES = [bs.LayerBits(weight, 8) for weight in (1, 2, 3, 4, 6, 8)]
SETTINGS = {"candidates": CANDIDATES, "pinned": {}, "method": bs.Fisher(images=8)}


def labelled(model: nn.Module) -> Samples:
    with torch.no_grad():
        return Samples.of(IMAGES, model(IMAGES).argmax(1))


@pytest.fixture
def by_bytes(monkeypatch):
    """Evaluations that a policy's bytes decide: 100 for the float network, and 2000 / bytes points less below."""
    calls = []

    def quantized(model, policy, data, **settings):
        calls.append(policy)
        return policy

    def value(network, samples, metric):
        return 1.0 if isinstance(network, nn.Module) else 1.0 - 20.0 / network.cost["weight_bytes"]

    monkeypatch.setattr(drop_file, "quantize", quantized)
    monkeypatch.setattr(drop_file, "_mean", value)
    return calls


def front_of(result: bs.SearchResult) -> list[bs.Policy]:
    return pareto_front(result.scores, result.choices, "weight_bytes", POINTS).policies


@pytest.mark.parametrize("allowed", [2.9, 4.0])
def test_it_is_the_smallest_of_the_front_that_is_good_enough(by_bytes, allowed):
    model = classifier()
    result = bs.search(model, labelled(model), f"drop={allowed}", **SETTINGS)
    front = front_of(result)
    fitting = [policy for policy in front if 2000.0 / policy.cost["weight_bytes"] <= allowed]
    assert result.policy.layers == fitting[0].layers
    assert len(by_bytes) <= 7 < len(front)
    measured = result.policy.provenance["drop"]
    assert measured["metric"] == "top1" and measured["float"] == 100.0 and measured["allowed"] == allowed
    assert measured["value"] == pytest.approx(100 - 2000 / result.policy.cost["weight_bytes"])


def test_caps_beside_the_drop_hold(by_bytes):
    model = classifier()
    capped = bs.search(model, labelled(model), "drop=50,mean_weight_bits=3", **SETTINGS)
    assert all(policy.cost["mean_weight_bits"] <= 3 for policy in front_of(capped)) and capped.policy.provenance["drop"]["allowed"] == 50.0


def test_a_front_that_misses_the_drop_says_by_how_much(by_bytes):
    model = classifier()
    with pytest.raises(bs.BitscapeError, match=r"budget drop=0.1: even the largest policy .* has top1 9\d.*, \d.* below .* 100; allow"):
        bs.search(model, labelled(model), "drop=0.1", **SETTINGS)


def test_a_killed_search_goes_on_where_it_stopped(by_bytes, monkeypatch, tmp_path):
    model = classifier()
    whole = bs.search(model, labelled(model), "drop=3.3", **SETTINGS).policy
    evaluations, measure = len(by_bytes), drop_file._mean
    by_bytes.clear()

    def killed(network, samples, metric):
        if len(by_bytes) == 3:
            raise KeyboardInterrupt
        return measure(network, samples, metric)

    monkeypatch.setattr(drop_file, "_mean", killed)
    with pytest.raises(KeyboardInterrupt):
        bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, **SETTINGS)
    monkeypatch.setattr(drop_file, "_mean", measure)
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"policy": "cut o')
    by_bytes.clear()
    monkeypatch.setattr(bs.Fisher, "score", None)  # scores are read back
    resumed = bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, **SETTINGS).policy
    assert resumed.layers == whole.layers and len(by_bytes) == evaluations - 2
    by_bytes.clear()
    other = bs.search(model, labelled(model), "drop=4", folder=tmp_path, **SETTINGS).policy  # another drop shares evaluations
    assert other.cost["weight_bytes"] <= whole.cost["weight_bytes"] and len(by_bytes) < evaluations
    records = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert len({record["policy"] for record in records[1:]}) == len(records) - 1
    with pytest.raises(bs.BitscapeError, match=r"is of another search: .*seed was 0 and is 1"):
        bs.search(model, labelled(model), "drop=4", folder=tmp_path, seed=1, **SETTINGS)


def test_real_evaluations_quantize_and_repair():
    model = classifier()
    data = labelled(model)
    result = bs.search(model, data, "drop=20", **SETTINGS)
    network = bs.quantize(model, result.policy, IMAGES)
    with torch.no_grad():
        value = 100 * float((network(IMAGES).argmax(1) == data.parts[0].targets).double().mean())
    assert result.policy.provenance["drop"]["value"] == pytest.approx(value) and value >= 80


def test_followed_outputs_drop_by_their_relative_error():
    result = bs.search(classifier(), IMAGES, "drop=0.2", task="follow", **SETTINGS)
    measured = result.policy.provenance["drop"]
    assert measured["metric"] == "-relative_error" and measured["float"] == 0.0 and -0.2 <= measured["value"] < 0


def test_the_users_metric_and_data_decide():
    model = classifier()

    def closeness(outputs, targets):
        return -float((outputs - targets).abs().mean())

    with torch.no_grad():
        pairs = [(part, model(part)) for part in IMAGES.split(16)]
    result = bs.search(model, IMAGES, "drop=0.05", metric=closeness, evaluation=pairs, **SETTINGS)
    measured = result.policy.provenance["drop"]
    assert measured["metric"] == "closeness" and measured["float"] == pytest.approx(0.0, abs=1e-6) and measured["value"] >= -0.05


@pytest.mark.parametrize(
    ("budget", "settings", "message"),
    [
        ("drop=0.5", {}, "budget drop: task 'classes' needs targets, and the data has none; pass evaluation="),
        ("drop=0", {}, "budget drop='0': give a positive number"),
        ("drop=half", {}, "budget drop='half': give a positive number"),
        ("drop=1,drop=2", {}, "budget gives drop twice"),
        ("drop=1", {"task": "follow", "method": "uniform"}, "method uniform has no scores; use a method .* such as fisher"),
        ("drop=1", {"task": "follow", "method": "seam"}, "method seam learns at one budget"),
    ],
)
def test_mistakes_are_told(budget, settings, message):
    with pytest.raises(bs.BitscapeError, match=message):
        bs.search(classifier(), IMAGES, budget, **{**SETTINGS, **settings})


def test_a_drop_is_no_cost():
    with pytest.raises(bs.BitscapeError, match=r"budget drop='0\.5': a drop is measured, by search alone"):
        bs.gain(classifier(), IMAGES, "drop=0.5")
