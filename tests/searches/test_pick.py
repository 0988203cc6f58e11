import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitscape.data.samples import Samples
from bitscape.engine import BatchLoss
from bitscape.errors import BitscapeError
from bitscape.models.digits import digits_net
from bitscape.policy import LayerBits, Policy
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.searches import pick as pick_file
from bitscape.searches.allocation import allocate, near_best
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.kl import Kl
from bitscape.searches.pick import chosen, least_sharp
from bitscape.searches.problem import SearchProblem
from bitscape.searches.scores import ScoreTable
from bitscape.sharpness import probe_sharpness
from tests.searches.small import noise_scores, square

pytestmark = pytest.mark.slow


def problem(budget: str = "bitops=w4a4") -> SearchProblem:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, images = digits_net().eval(), torch.randn(24, 1, 8, 8)
    return SearchProblem.of(model=model, samples=images, budget=budget, candidates=square(2, 3, 4, 6, 8))


def scores_of(given: SearchProblem) -> ScoreTable:
    return noise_scores(given.network, given.choices.candidates, 3)


def stated(given: SearchProblem) -> tuple[Any, ...]:
    return scores_of(given), given.choices


class Probe:
    """A measure that answers with given gaps, and keeps what it was asked."""

    def __init__(self, *gaps: float) -> None:
        self.gaps: Iterator[float] = iter(gaps)
        self.asked: list[tuple[nn.Module, torch.Tensor, torch.Tensor, float]] = []

    def __call__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, radius: float, loss: BatchLoss) -> SimpleNamespace:
        logits = torch.randn(len(labels), 10)
        assert torch.equal(loss(logits, labels), cross_entropy(logits, labels))
        self.asked.append((model, images, labels, radius))
        return SimpleNamespace(gap=next(self.gaps), curvature=7.0)


@pytest.mark.parametrize(
    ("gaps", "kept"),
    [((3.0, 1.0, 2.0), 1), ((0.5, 1.0, 2.0), 0), ((2.0, 1.0, 1.0), 1), ((math.nan, 2.0, math.nan), 1), ((1.0, 2.0, -0.1), 2)],
)
def test_the_least_sharp_is_kept_and_of_equals_the_better_scored(
    monkeypatch: pytest.MonkeyPatch, gaps: tuple[float, ...], kept: int
) -> None:
    given = problem()
    policies = near_best(*stated(given), count=3, within=1.0)
    monkeypatch.setattr(pick_file, "probe_sharpness", Probe(*gaps))
    policy, records = least_sharp(given, policies)
    assert policy is policies[kept]
    assert [record["gap"] for record in records] == pytest.approx(gaps, nan_ok=True)
    assert [record["curvature"] for record in records] == [7.0] * 3
    assert [record["score"] for record in records] == [p.provenance["score"] for p in policies]


def test_a_record_counts_the_layers_that_differ_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    (first,) = near_best(*stated(given), count=1)
    moved = {name: LayerBits(2, 2) if first.layers[name] != LayerBits(2, 2) else LayerBits(8, 8) for name in given.free_layers[:3]}
    others = [Policy({**first.layers, **dict(list(moved.items())[:n])}, provenance={"score": n}) for n in (3, 1)]
    monkeypatch.setattr(pick_file, "probe_sharpness", Probe(1.0, 2.0, 3.0))
    _, records = least_sharp(given, [first, *others])
    assert [record["layers_changed"] for record in records] == [0, 3, 1]


def test_each_policy_is_probed_as_a_calibrated_network_with_the_float_networks_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    given, probe = problem(), Probe(1.0, 2.0, 3.0)
    all_images = given.samples.parts[0].inputs
    policies = near_best(*stated(given), count=3, within=1.0)
    monkeypatch.setattr(pick_file, "probe_sharpness", probe)
    least_sharp(given, policies, images=10, radius=0.3)
    assert len(probe.asked) == 3
    for (model, images, labels, radius), policy in zip(probe.asked, policies, strict=True):
        layers = quantized_layers(model)
        assert {name: static_bits(layer) for name, layer in layers.items()} == dict(policy.layers)
        assert radius == 0.3
        assert torch.equal(images, all_images[:10])
        with torch.no_grad():
            assert torch.equal(labels, given.prepared(images).argmax(1))
            model(images)  # raises where an activation scale is not set


def test_best_is_what_allocate_finds_and_probes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    monkeypatch.setattr(pick_file, "probe_sharpness", Probe())
    assert chosen(given, scores_of(given), "best") == (allocate(*stated(given)), ())


def test_the_choice_is_a_near_best_policy_with_the_smallest_gap() -> None:
    given = problem()
    policies = near_best(*stated(given))
    policy, trace = chosen(given, scores_of(given), "least-sharp")
    assert len(trace) == len(policies) > 1
    assert policy in policies
    assert given.choices.budget.exceeded(given.network, policy) == {}
    gaps = [record["gap"] for record in trace]
    assert gaps[policies.index(policy)] == min(gaps)
    assert len(set(gaps)) > 1
    assert all(record["score"] <= after["score"] for record, after in pairwise(trace))
    ideal = sum(scores_of(given).values[list(given.network.by_name).index(name)].min() for name in given.free_layers)
    best = trace[0]["score"]
    assert policy.provenance["score"] <= best + 0.01 * (best - ideal) * (1 + 1e-6)


def test_the_probed_gap_is_that_of_the_quantized_network() -> None:
    given = problem()
    policies = near_best(*stated(given), count=2)
    _, records = least_sharp(given, policies, images=16, radius=0.1)
    images = given.samples.parts[0].inputs[:16]
    with torch.no_grad():
        labels = given.prepared(images).argmax(1)
    for record, policy in zip(records, policies, strict=True):
        model = pick_file.calibrate(pick_file.with_quantizers(given.prepared, policy), images)
        assert probe_sharpness(model, images, labels, radius=0.1).gap == record["gap"]


def test_other_tasks_are_probed_by_their_divergence_from_the_float_outputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"value": self.head((self.one(left) + self.two(right)).relu())}

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 4, generator=generator), torch.randn(20, 3, generator=generator)
    given = SearchProblem.of(
        Net().eval(), Samples.of(inputs), "weight_bytes=w4", candidates=square(2, 4, 8), pinned={}, task="follow"
    )
    (policy,) = near_best(noise_scores(given.network, given.choices.candidates, 3), given.choices, count=1)
    _, (record,) = least_sharp(given, [policy], radius=0.1)
    model = pick_file.calibrate(pick_file.with_quantizers(given.prepared, policy), Samples.of(inputs))
    with torch.no_grad():
        aims = given.prepared(*inputs)["value"]
    spread = float(aims.double().std(unbiased=False))

    def loss(outputs: dict[str, torch.Tensor], aims: torch.Tensor) -> torch.Tensor:
        return ((outputs["value"] - aims) / spread).square().sum(1).mean() / 2

    assert record["gap"] == pytest.approx(probe_sharpness(model, inputs, aims, radius=0.1, loss=loss).gap, rel=1e-4)
    assert record["gap"] > 0


def test_samples_of_several_shapes_are_refused_before_they_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples([*Samples.of(torch.ones(2, 1, 8, 8)).parts, *Samples.of(torch.ones(2, 1, 8, 6)).parts])
    given = SearchProblem.of(model=digits_net().eval(), samples=samples, budget="bitops=w4a4")
    monkeypatch.setattr(Kl, "score", None)
    with pytest.raises(BitscapeError, match=r"shapes \[\[1, 8, 8\]\] and \[\[1, 8, 6\]\] do not .*with pick='best'"):
        Kl().search(given, pick="least-sharp")


def test_the_choice_repeats_and_leaves_network_and_random_state_alone() -> None:
    given = problem()
    before, random_state = copy.deepcopy(given.prepared.state_dict()), torch.get_rng_state()
    first = chosen(given, scores_of(given), "least-sharp")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in given.prepared.state_dict().items())
    assert not quantized_layers(given.prepared)
    assert all(parameter.grad is None for parameter in given.prepared.parameters())
    torch.manual_seed(99)
    assert chosen(problem(), scores_of(given), "least-sharp") == first


def test_an_unknown_pick_and_an_infeasible_budget_are_refused() -> None:
    given = problem("bitops=0.01x")
    with pytest.raises(BitscapeError, match="pick='flattest': allowed are 'best', 'least-sharp'"):
        Kl().search(given, pick="flattest")  # type: ignore[arg-type]
    with pytest.raises(InfeasibleBudget, match="bitops"):
        chosen(given, scores_of(given), "least-sharp")
