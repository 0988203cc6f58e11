"""The smallest policy within a drop: bisection over real evaluations, kept in a folder."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.data.samples import Samples
from bitscape.engine.user_task import User
from bitscape.searches.allocation import pareto_front
from bitscape.verbs import drop as drop_file
from bitscape.verbs.drop import POINTS
from bitscape.verbs.evaluations import SCORES_FILE
from tests.verbs.test_verbs import IMAGES, LABELS, classifier

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

    def value(network, epochs, task, *, reference):
        points = 100.0 if isinstance(network, nn.Module) else 100.0 - 2000.0 / network.cost["weight_bytes"]
        return SimpleNamespace(value=points)

    monkeypatch.setattr(drop_file, "quantize", quantized)
    monkeypatch.setattr(drop_file, "measured", value)
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


def test_the_gain_is_that_of_a_budget_of_the_bytes_found(by_bytes):
    model = classifier()
    data = labelled(model)
    result = bs.search(model, data, "drop=2.9", **SETTINGS)
    budget = {"weight_bytes": result.policy.cost["weight_bytes"]}
    capped = bs.search(model, data, budget, **SETTINGS)
    assert result.gain == capped.gain and result.gain.weights is not None


def test_a_log_that_is_no_text_is_named(by_bytes, tmp_path):
    (tmp_path / "evaluations.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(bs.BitscapeError, match=r"evaluations\.jsonl: it is damaged"):
        bs.search(classifier(), labelled(classifier()), "drop=2.9", folder=tmp_path, **SETTINGS)


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
    evaluations, measure = len(by_bytes), drop_file.measured
    by_bytes.clear()

    def killed(network, epochs, task, *, reference):
        if len(by_bytes) == 3:
            raise KeyboardInterrupt
        return measure(network, epochs, task, reference=reference)

    monkeypatch.setattr(drop_file, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, **SETTINGS)
    monkeypatch.setattr(drop_file, "measured", measure)
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
    policies = [record["policy"] for record in records if "policy" in record]
    assert len(set(policies)) == len(policies) == len(records) - 2  # the search and its scores have a line each
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


class Hits:
    """Percent right, collected over batches."""

    def __init__(self, scale: float = 100.0) -> None:
        self.scale, self.right, self.samples = scale, 0, 0

    def update(self, outputs, targets):
        self.right, self.samples = self.right + int((outputs.argmax(1) == targets).sum()), self.samples + len(targets)

    def compute(self):
        return self.scale * self.right / self.samples


class Named(nn.Module):
    """Two outputs by name, of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()

    def forward(self, images):
        outputs = self.body(images)
        return {"large": outputs[:, :2] * 100, "small": outputs[:, 2:3] * 0.01}


def one_hot(model):
    labels = labelled(model).parts[0].targets
    return IMAGES, nn.functional.one_hot(labels, 5).float()


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()


@pytest.mark.parametrize(
    ("model", "data_of", "settings", "reference", "sign", "name"),
    [
        (classifier, labelled, {}, False, 1, "top1"),
        (classifier, one_hot, {"task": "classes"}, False, 1, "top1"),
        (classifier, labelled, {"metric": Hits()}, False, 1, "Hits"),
        (dense, labelled, {"task": "dense"}, False, 1, "mean_iou"),
        (Named, lambda _: IMAGES, {"task": "follow"}, True, -1, "-relative_error"),
        (Named, lambda _: (IMAGES, LABELS), {}, True, -1, "-relative_error"),
    ],
)
def test_a_drop_is_measured_as_evaluate_measures(model, data_of, settings, reference, sign, name):
    model = model().eval()
    data = data_of(model)
    result = bs.search(model, data, f"drop={0.9 if reference else 90}", **SETTINGS, **settings)
    told = result.policy.provenance["drop"]
    network = bs.quantize(model, result.policy, data)
    value = bs.evaluate(network, data, **settings, **({"reference": model} if reference else {})).value
    assert told["metric"] == name and told["value"] == pytest.approx(sign * value, rel=1e-4)
    assert result.front.kind == "weight_bytes" and result.front.chosen.layers == result.policy.layers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused_before_scores_are_made(monkeypatch, value):
    model = classifier()
    monkeypatch.setattr(bs.Fisher, "score", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(bs.BitscapeError, match=f"budget drop: the metric of the float network is {value}; it must be finite"):
        bs.search(model, labelled(model), "drop=5", metric=lambda outputs, targets: value, **SETTINGS)


def test_scores_of_something_else_are_neither_used_nor_overwritten(by_bytes, tmp_path):
    model = classifier()
    whole = bs.search(model, labelled(model), "drop=3.3", **SETTINGS)
    foreign = bs.search(model, IMAGES, "4bit", **{**SETTINGS, "method": "local"}).scores
    names = ("scores.json", SCORES_FILE)
    for name in names:
        foreign.save(tmp_path / name)
    before = (tmp_path / names[0]).read_bytes()
    scores = bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, **SETTINGS).scores
    assert scores.method == "fisher" and (scores.values == whole.scores.values).all()
    assert (tmp_path / names[0]).read_bytes() == before
    foreign.save(tmp_path / names[1])
    assert bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, **SETTINGS).scores.method == "fisher"


def scaled(factor):
    return lambda outputs, targets: factor * float((outputs.argmax(1) == targets).double().mean())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda outputs, targets: 1.0, lambda outputs, targets: 2.0),
        (scaled(1.0), scaled(100.0)),
        (Hits(), Hits(1.0)),
    ],
)
def test_evaluations_by_another_metric_of_the_same_name_are_not_used(by_bytes, tmp_path, first, second):
    model = classifier()
    bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, metric=first, **SETTINGS)
    by_bytes.clear()
    bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, metric=first, **SETTINGS)
    assert not by_bytes
    with pytest.raises(bs.BitscapeError, match=r"is of another search: metric\.code"):
        bs.search(model, labelled(model), "drop=3.3", folder=tmp_path, metric=second, **SETTINGS)


@pytest.mark.parametrize(
    ("budget", "settings", "message"),
    [
        ("drop=5", {"pick": "least-sharp"}, "pick='least-sharp': a budget of drop=... measures the policies"),
        ("drop=5", {"pick": "flattest"}, "pick='flattest': allowed are 'best', 'least-sharp'"),
        ("4bit", {"pick": "flattest"}, "pick='flattest': allowed are 'best', 'least-sharp'"),
        ("4bit", {"metric": scaled(1.0)}, "metric: a budget of caps is met without measuring; leave metric out"),
        ("4bit", {"evaluation": IMAGES, "metric": scaled(1.0)}, "evaluation: .* leave evaluation and metric out"),
    ],
)
def test_arguments_without_effect_are_refused_before_any_work(monkeypatch, budget, settings, message):
    monkeypatch.setattr("bitscape.verbs.search.search_problem", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(bs.BitscapeError, match=message):
        bs.search(classifier(), IMAGES, budget, **settings)


@pytest.mark.parametrize(
    ("method", "count", "samples"),
    [(bs.Fisher(images=300), None, 300), ("fisher", None, 256), ("uniform", None, 256), (bs.Fisher(images=300), 64, 64)],
)
def test_a_method_gets_the_samples_it_asks_for_unless_count_says_fewer(method, count, samples):
    images = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    policy = bs.search(classifier(), images, "4bit", method=method, count=count, candidates=CANDIDATES).policy
    assert policy.provenance["images"] == [samples, 3, 8, 8]


def test_data_for_evaluation_with_other_targets_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(bs.Fisher, "score", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(bs.BitscapeError, match=r"targets: shape \(3,\) for 40 samples; give one for each sample"):
        bs.search(classifier(), IMAGES, "drop=5", evaluation=(IMAGES, LABELS[:3]), **SETTINGS)


def test_a_loss_counts_with_a_minus():
    model = classifier()

    def distance(outputs, targets):
        return (outputs - targets).square().mean()

    with torch.no_grad():
        pairs = IMAGES, model(IMAGES) + 0.1
    told = bs.search(model, pairs, "drop=0.9", task=User(distance), **SETTINGS).policy.provenance["drop"]
    assert told["metric"] == "-loss" and told["float"] == pytest.approx(-0.01, rel=1e-3) and -0.91 <= told["value"] < 0
