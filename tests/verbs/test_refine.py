from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitscape as bs
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.searches.allocation import group_scores
from bitscape.searches.problem import SearchProblem
from bitscape.searches.scores import ScoreTable
from bitscape.verbs import refine as refine_file
from bitscape.verbs.proxy import parted
from bitscape.verbs.refine import Beliefs, parts_of, proposed

PAIRS = tuple(LayerBits(w, a) for w in (2, 4, 8) for a in (2, 4, 8))
IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
BUDGET = "bitops=w4a4"


def network() -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *middle, nn.Flatten(), nn.Linear(128, 5)).eval()


def problem() -> SearchProblem:
    return SearchProblem.of(network(), IMAGES, BUDGET, candidates=PAIRS, pinned={})


def scores(stated: SearchProblem) -> ScoreTable:
    """Additive: 4^-bits of weights and of activations, each layer alike."""
    row = [4.0**-pair.weight + 4.0**-pair.activation for pair in PAIRS]
    return ScoreTable(stated.free_layers, PAIRS, np.array([row] * len(stated.free_layers)), "planted")


def test_parts_of_weights_and_activations_add_up_to_the_score_above_the_best() -> None:
    values = np.array([[4.0, 3.0, 2.5, 2.0], [4.0, np.inf, 2.5, np.inf]])
    pairs = [LayerBits(2, 2), LayerBits(2, 8), LayerBits(8, 2), LayerBits(8, 8)]
    weights, activations = parts_of(values, pairs)
    assert weights.tolist() == [[1.0, 1.0, 0.0, 0.0], [1.5, np.inf, 0.0, np.inf]]
    assert activations.tolist() == [[1.0, 0.0, 0.5, 0.0], [0.0, np.inf, 0.0, np.inf]]


def test_factors_are_learned_from_what_was_measured() -> None:
    """Activations cost four times what the scores say, weights a fourth of it."""
    stated = problem()
    values = group_scores(scores(stated), stated.choices)
    beliefs, parts = Beliefs(values, stated.choices), parts_of(values, PAIRS)
    generator = np.random.default_rng(0)
    for choice in generator.integers(0, len(PAIRS), (60, len(values))):
        of_weights, of_activations = (part[np.arange(len(values)), choice].sum() for part in parts)
        beliefs.add(tuple(choice.tolist()), 0.25 * of_weights + 4.0 * of_activations)
    of_weights, of_activations = beliefs.unit * beliefs.posterior()[0].reshape(2, -1)
    assert (of_activations > 3.0).all() and (of_activations < 5.0).all()
    assert (of_weights < 1.0).all()


def test_a_choice_rises_by_what_is_not_known_of_it_until_it_is_measured() -> None:
    stated = problem()
    beliefs = Beliefs(group_scores(scores(stated), stated.choices), stated.choices)
    first, other = (stated.choices.uniform(PAIRS.index(LayerBits(*bits))) for bits in ((4, 2), (2, 4)))
    beliefs.add(first, 1.0)
    start, unknown = beliefs.rises([first, other])
    assert start == 0.0 < 0.1 < unknown  # their scores are equal
    beliefs.add(other, 0.1)
    assert beliefs.rises([other])[0] < -0.1


def test_first_comes_the_given_choice_then_uniform_bits_then_new_ones_within_the_budget() -> None:
    stated = problem()
    beliefs = Beliefs(group_scores(scores(stated), stated.choices), stated.choices)
    first = stated.choices.narrowest()
    seen = []
    for choice in proposed(beliefs, first, seed=0):
        seen.append(choice)
        beliefs.add(choice, float(len(seen)))
        if len(seen) == 8:
            break
    assert seen[0] == first and seen[1] == stated.choices.uniform(PAIRS.index(LayerBits(4, 4)))
    assert len(set(seen)) == len(seen) and all(map(stated.choices.holds, seen))


def test_nothing_is_tried_where_the_first_choice_costs_no_score() -> None:
    stated = problem()
    beliefs = Beliefs(group_scores(scores(stated), stated.choices), stated.choices)
    proposals = proposed(beliefs, stated.choices.uniform(PAIRS.index(LayerBits(8, 8))), seed=0)
    beliefs.add(next(proposals), 0.5)
    assert list(proposals) == []


def planted(policy: Policy) -> float:
    """What only a measurement knows: 2-bit activations of the second layer are worth nothing."""
    pairs = dict(policy.layers)
    return sum(4.0**-p.weight + 4.0**-p.activation for p in pairs.values()) - 4.0 ** -pairs["2"].activation


def test_the_best_measured_policy_is_kept_and_goes_on_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Policy] = []

    def divergence(self: object, policy: Policy) -> float:
        measured.append(policy)
        return planted(policy)

    monkeypatch.setattr(refine_file._Halves, "divergence", divergence)

    def found(refine: int, folder: Path | None = None) -> bs.SearchResult:
        measured.clear()
        return bs.search(network(), IMAGES, BUDGET, candidates=PAIRS, pinned={}, refine=refine, folder=folder)

    result = found(6)
    assert len(measured) == 6 == len(result.trace)
    about = result.policy.provenance["refine"]
    assert about["divergence"] == planted(result.policy) <= about["first"] == planted(measured[0])
    assert result.policy.cost["bitops"] <= result.choices.budget.caps["bitops"]
    assert found(6).policy.layers == result.policy.layers

    found(4, tmp_path)
    assert dict(Policy.load(tmp_path / "policy.json").layers).keys() == dict(result.policy.layers).keys()
    resumed = found(6, tmp_path)
    assert len(measured) == 2 and resumed.policy.layers == result.policy.layers


def test_each_half_judges_the_network_that_the_other_repairs() -> None:
    stated = problem()
    policy = stated.choices.policy(stated.choices.uniform(PAIRS.index(LayerBits(2, 4))), {})
    halves = parted(stated.samples, 2)
    found = []
    for seen, judging in (halves, halves[::-1]):
        network_of_half = bs.quantize(network(), policy, seen)
        images = judging.parts[0].inputs
        with torch.no_grad():
            found.append(stated.meaning.divergence(network_of_half(images), network()(images)))
    expected = float(torch.cat(found).mean())
    assert refine_file._Halves(stated).divergence(policy) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refine": -1}, "refine=-1: it counts policies"),
        ({"refine": 2, "for_training": True}, "leave it out, or for_training"),
        ({"refine": 2, "method": "uniform"}, "method uniform has no scores"),
    ],
)
def test_what_cannot_be_refined_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        bs.search(network(), IMAGES, BUDGET, candidates=PAIRS, pinned={}, **arguments)


def test_a_drop_measures_by_itself() -> None:
    with pytest.raises(BitscapeError, match="measures policies by itself; leave refine out"):
        bs.search(network(), IMAGES, "drop=1", candidates=PAIRS, refine=2)
