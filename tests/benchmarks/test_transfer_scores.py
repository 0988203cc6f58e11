import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import transfer_scores
from benchmarks.transfer_scores import (
    CASES,
    KEYS,
    MAP_SIDE,
    PROXIES,
    SCORES,
    agreements,
    kendall,
    predicted_loss,
    rank_correlations,
    regret,
    spearman,
    wanted,
)
from bitscape.report.records import identity, missing


def _random(seed: int, a: int, b: int, top1: float, loss: float, epochs: int = 0) -> dict:
    policy = {"first": [8, 8], "a": [a, a], "b": [b, b]}
    return {"network": "n", "method": "random", "seed": seed, "epochs": epochs, "policy": policy, "top1": top1, "extra": {"loss": loss}}


def _table(a: list[float], b: list[float], policy: dict | None = None, proxy: str | None = None, top1: float = 0.0) -> dict:
    extra = {"loss": 1.0, "candidates": ["2/2", "4/4"], "scores": {"a": a, "b": b}}
    policy = policy or {"first": [8, 8], "a": [4, 4], "b": [2, 2]}
    fields = {"network": "n", "method": "fisher", "variant": None, "proxy": proxy, "seed": 0, "epochs": 0}
    return {**fields, "policy": policy, "top1": top1, "extra": extra}


RANDOMS = [_random(0, 4, 4, 90.0, 0.3), _random(1, 2, 4, 80.0, 0.6), _random(2, 4, 2, 60.0, 1.2), _random(3, 2, 2, 50.0, 2.0)]


def test_no_run_twice_and_random_policies_first():
    runs = list(wanted())
    keys = [identity(run, KEYS) for run in runs]
    assert len(set(keys)) == len(keys)
    assert missing([], runs, KEYS) == runs  # every field is compared
    assert [run["seed"] for run in runs[:100]] == list(range(100)) and {run["method"] for run in runs[:100]} == {"random"}
    blocks = list(dict.fromkeys((run["network"], run["epochs"], run["method"] == "random") for run in runs))
    small, large = CASES
    assert blocks == [(small, 0, True), (small, 0, False), (large, 0, True), (large, 0, False), (small, 1, True), (small, 1, False)]


def test_every_trained_policy_was_measured_before_and_each_case_has_all_scores():
    runs = list(wanted())
    place = {identity(run, KEYS): at for at, run in enumerate(runs)}
    assert all(place[identity({**run, "epochs": 0}, KEYS)] < at for at, run in enumerate(runs) if run["epochs"])
    for network in CASES:
        untrained = {identity(run, ("method", "variant", "proxy")) for run in runs if run["network"] == network and not run["epochs"]}
        scored = {(*score, proxy) for score in SCORES for proxy in PROXIES if score[1] != MAP_SIDE or proxy is None}
        assert untrained == {("random", None, None), *scored}


def test_predicted_loss_is_the_sum_over_free_layers():
    assert predicted_loss(_table([3.0, 1.0], [10.0, 2.0]), {"first": [8, 8], "a": [2, 2], "b": [4, 4]}) == 5.0


def test_rank_correlations_by_hand():
    # Predicted 3, 5, 11, 13: in the order of the measured losses. With the layers' scores swapped 3, 11, 5, 13: one of six pairs is wrong.
    right, swapped = rank_correlations([*RANDOMS, _table([3.0, 1.0], [10.0, 2.0]), _table([10.0, 2.0], [3.0, 1.0])])
    assert (right["spearman_loss"], right["kendall_loss"]) == pytest.approx((1.0, 1.0))
    assert (right["spearman_loss_low"], right["kendall_top1_high"]) == pytest.approx((1.0, 1.0))
    assert (swapped["spearman_top1"], swapped["kendall_top1"]) == pytest.approx((1 - 6 * 2 / 60, (5 - 1) / 6))
    assert swapped["spearman_top1_low"] < swapped["spearman_top1"] < swapped["spearman_top1_high"]
    assert (right["policies"], right["regret"], right["epochs"]) == (4, 0.0, 0)


def test_trained_policies_are_a_set_of_their_own_and_two_are_no_ranking():
    after = [
        _random(seed, *bits, top1, 3 - top1 / 50, epochs=1)
        for seed, bits, top1 in ((0, (4, 4), 70.0), (1, (2, 4), 80.0), (2, (2, 2), 90.0))
    ]
    table = _table([3.0, 1.0], [10.0, 2.0])
    before, trained = rank_correlations([*RANDOMS, table, *after])
    assert (before["epochs"], trained["epochs"]) == (0, 1)
    assert trained["spearman_loss"] == pytest.approx(-1.0)
    assert len(rank_correlations([*RANDOMS, table, *after[:2]])) == 1


def test_a_score_without_differences_has_no_correlation():
    (row,) = rank_correlations([*RANDOMS, _table([1.0, 1.0], [0.1, 0.1])])
    assert row["spearman_loss"] is row["kendall_top1_low"] is None


def test_statistics_are_scipys_on_samples_with_repeats_and_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 30).astype(float), rng.normal(size=30).round(1)
    counts = rng.multinomial(30, [1 / 30] * 30, size=5).astype(float)
    for draw, sample in enumerate(counts):
        rows = np.repeat(np.arange(30), sample.astype(int))
        assert spearman(x, y, counts)[draw] == pytest.approx(stats.spearmanr(x[rows], y[rows]).statistic)
        assert kendall(x, y, counts)[draw] == pytest.approx(stats.kendalltau(x[rows], y[rows]).statistic)


def test_intervals_repeat():
    runs = [*RANDOMS, _table([10.0, 2.0], [3.0, 1.0])]
    assert rank_correlations(runs) == rank_correlations(runs)


def test_regret_is_what_the_best_policy_has_over_the_ones_ranked_first():
    predicted, top1 = np.array([0.0, 1.0, 2.0, 3.0]), np.array([50.0, 70.0, 90.0, 80.0])
    assert [regret(predicted, top1, first) for first in (1, 2, 3, 10)] == [40.0, 20.0, 0.0, 0.0]


def test_agreement_with_the_targets_own_policy():
    own = {"first": [8, 8], "a": [2, 4], "b": [4, 4]}
    same = _table([0.0, 0.0], [0.0, 0.0], own, "same:1", 70.0)
    other = _table([0.0, 0.0], [0.0, 0.0], {"first": [8, 8], "a": [4, 2], "b": [4, 4]}, "other:1", 60.0)
    other["extra"]["scores"]["c"], own["c"], other["policy"]["c"] = [0.0, 0.0], [6, 4], [3, 6]
    for run in (same, other):
        run["extra"]["scores"] = {"a": [], "b": [], "c": []}
    rows = agreements([*RANDOMS, same, _table([0.0, 0.0], [0.0, 0.0], own, None, 71.0), other])
    assert [row["proxy"] for row in rows] == ["same:1", "other:1"]
    assert (rows[0]["weight_spearman"], rows[0]["same_pairs"], rows[0]["top1"], rows[0]["target_top1"]) == (
        pytest.approx(1.0),
        1.0,
        70.0,
        71.0,
    )
    # Weight bits (4, 4, 3) against (2, 4, 6): ranks (2.5, 2.5, 1) and (1, 2, 3), correlation -sqrt(3) / 2.
    assert rows[1]["weight_spearman"] == pytest.approx(-(3**0.5) / 2)
    assert (rows[1]["activation_spearman"], rows[1]["same_pairs"]) == (None, pytest.approx(1 / 3))  # the target's are all 4


def test_digits_are_grey_in_three_channels_and_noise_is_standard_normal():
    digits = transfer_scores.source("resnet20", "digits:256").images
    assert digits.shape[1:] == (3, 8, 8) and torch.equal(digits[:, 0], digits[:, 2])
    noise = transfer_scores.images("resnet20", "noise:256")
    assert noise.shape == (256, 3, 32, 32)
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0.0, 1.0), abs=0.01)


def test_topological_entropy_sees_one_class_where_there_is_enough_of_it():
    digits = transfer_scores.source("resnet20", "digits:256")
    alike = transfer_scores.class_images("resnet20", "digits:256")
    resized = transfer_scores.WEIGHTS["resnet20"].normalization.apply(digits.resized(32).images)
    matches = [int((resized == image).flatten(1).all(1).nonzero()[0]) for image in alike[::16]]
    assert (len(alike), len(set(matches)), len(set(digits.labels[matches].tolist()))) == (128, 8, 1)
    assert torch.equal(transfer_scores.class_images("resnet20", "noise:256"), transfer_scores.images("resnet20", "noise:256")[:128])


def test_a_policy_measured_before_is_not_measured_again(monkeypatch: pytest.MonkeyPatch):
    policy = {"conv": [4, 4]}
    found = {"settings": {}, "policy": policy, "budget": {}, "cost": {}, "search_s": 1.0}
    monkeypatch.setattr(transfer_scores, "searched", lambda run: {**found, "extra": {"repairs": 3}})
    monkeypatch.setattr(transfer_scores, "evaluated", lambda run: {"top1": 50.0 + run["epochs"], "test_images": 9, "extra": {"loss": 2.0}})
    wish = {"network": "resnet20", "method": "local", "variant": None, "proxy": None, "seed": 0, "epochs": 0}
    first = transfer_scores.measure(wish, [])
    assert (first["top1"], first["extra"]) == (50.0, {"loss": 2.0, "repairs": 3})
    twin = {**first, "method": "kl", "top1": 77.0, "extra": {"loss": 1.5, "repairs": 8}}
    assert transfer_scores.measure(wish, [twin])["top1"] == 77.0
    assert transfer_scores.measure(wish, [twin])["extra"] == {"loss": 1.5, "repairs": 3}
    monkeypatch.setattr(transfer_scores, "searched", None)  # the row before training has the policy
    trained = transfer_scores.measure({**wish, "epochs": 1}, [twin, first])
    assert (trained["top1"], trained["policy"], trained["extra"]) == (51.0, policy, {"loss": 2.0})
