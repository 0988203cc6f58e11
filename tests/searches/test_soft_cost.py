from itertools import product

import numpy as np
import pytest
import torch

from bitscape.cost.policy_cost import policy_cost
from bitscape.policy import LayerBits, Policy
from bitscape.searches import mixture_search
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.problem import SearchProblem
from bitscape.searches.soft_cost import soft_cost
from tests.searches.small import square
from tests.sharpness.small import batch, float_net

pytestmark = pytest.mark.slow

WIDTHS = (2, 3, 8)
SUMS = ("bitops=w4a4", "weight_bytes=w4", "mean_weight_bits=4", "mean_activation_bits=5")
SEVERAL = [("bitops=w4a4", "weight_bytes=w3"), ("mean_weight_bits=3", "mean_activation_bits=3"), SUMS]


def problem(budget, candidates=None, pinned=None, tied=()):
    images, _ = batch(4)
    return SearchProblem.of(
        model=float_net(), samples=images, budget=budget, candidates=candidates or square(*WIDTHS), pinned=pinned or {}, tied=tied
    )


def stated(given):
    return soft_cost(given, WIDTHS, WIDTHS)


def groups(given):
    return len(given.choices.freedom.groups)


def one_hot(places):
    return torch.nn.functional.one_hot(torch.tensor(places), len(WIDTHS)).float()


def policies(given):
    """Every policy, with the place of each group's weight and activation width."""
    sides = list(product(range(len(WIDTHS)), repeat=groups(given)))
    for weights, inputs in product(sides, sides):
        pairs = [LayerBits(WIDTHS[w], WIDTHS[a]) for w, a in zip(weights, inputs, strict=True)]
        bits = {name: pair for group, pair in zip(given.choices.freedom.groups, pairs, strict=True) for name in group}
        yield weights, inputs, Policy({**bits, **given.choices.freedom.pinned})


def random_logits(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(count, len(WIDTHS), generator=generator) for _ in range(2)]


def without_price(prices):
    return [torch.where(price.isfinite(), 0.0, price) for price in prices]


def used(cost, logits, prices):
    return cost.expected(*((u - price).softmax(1) for u, price in zip(logits, prices, strict=True)))


@pytest.mark.parametrize(
    "settings", [{}, {"pinned": {"0": LayerBits(8, 8)}}, {"tied": [("4", "6")]}], ids=["all free", "one pinned", "two tied"]
)
def test_one_hot_shares_cost_what_the_policy_does_in_units_of_the_cap(settings):
    given = problem(SUMS, **settings)
    cost, caps = stated(given), given.choices.budget.caps
    for weights, inputs, policy in list(policies(given))[::7]:
        expected = {kind: value / caps[kind] for kind, value in policy_cost(given.network, policy).items() if kind in caps}
        assert cost.expected(one_hot(weights), one_hot(inputs)) == pytest.approx(expected, rel=1e-12)


def test_the_cost_of_soft_shares_is_the_mean_over_policies():
    given = problem(SUMS, tied=[("0", "4")])
    shares = [u.softmax(1) for u in random_logits(2, 0)]
    expected = dict.fromkeys(given.choices.budget.caps, 0.0)
    for weights, inputs, policy in policies(given):
        chance = np.prod([shares[side][at, place] for side, of in enumerate((weights, inputs)) for at, place in enumerate(of)])
        for kind in expected:
            expected[kind] += float(chance) * policy_cost(given.network, policy)[kind] / given.choices.budget.caps[kind]
    assert stated(given).expected(*shares) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("budget", [*SUMS, "bitops=w2a3", "weight_bytes=0.4x", "mean_weight_bits=7.9"])
@pytest.mark.parametrize("seed", range(4))
def test_the_price_makes_the_expected_cost_the_budget_where_bits_are_short(budget, seed):
    given = problem(budget)
    cost, logits = stated(given), random_logits(groups(given), seed)
    prices = cost.prices(*logits)
    (before,), (after,) = (used(cost, logits, p).values() for p in (without_price(prices), prices))
    assert after == pytest.approx(1.0, abs=1e-5) if before > 1 else after == before
    assert all(bool((price >= 0).all()) for price in prices)


@pytest.mark.parametrize("budget", SEVERAL)
@pytest.mark.parametrize("seed", range(12))
def test_several_caps_all_hold_and_one_short_of_bits_is_used_up(budget, seed):
    given = problem(budget)
    cost, logits = stated(given), random_logits(groups(given), seed)
    prices = cost.prices(*logits)
    free, after = (used(cost, logits, p) for p in (without_price(prices), prices))
    assert max(after.values()) <= 1 + 1e-3
    if max(free.values()) > 1:
        assert max(after.values()) == pytest.approx(1.0, abs=1e-3)


def test_a_cap_that_another_makes_slack_has_no_price_either():
    both, alone = (stated(problem(budget)) for budget in (("bitops=0.52x", "mean_weight_bits=4"), "mean_weight_bits=4"))
    logits = [torch.tensor([0.0, 0.0, 2.0]).expand(3, 3)] * 2
    prices, of_alone = both.prices(*logits), alone.prices(*logits)
    assert used(both, logits, without_price(prices))["bitops"] > 1
    assert used(both, logits, prices)["bitops"] < 0.98
    torch.testing.assert_close(prices, of_alone, rtol=1e-5, atol=1e-5)


def test_a_slack_cap_has_no_price():
    given = problem(("bitops=1x", "weight_bytes=w8", "peak_activation_bytes=w8a8"))
    assert not torch.cat(stated(given).prices(*random_logits(3, 0))).any()


def test_the_price_of_a_width_is_in_proportion_to_its_cost():
    given = problem("mean_weight_bits=5.5")
    prices, idle = stated(given).prices(*([torch.tensor([0.0, 1.0, 4.0]).expand(3, 3)] * 2))
    weights = torch.tensor([layer.weights for layer in given.network.layers])
    per_bit = prices / (weights[:, None] * torch.tensor(WIDTHS))
    torch.testing.assert_close(per_bit, per_bit[:1, :1].expand(3, 3), rtol=1e-4, atol=0)
    assert per_bit[0, 0] > 0
    # Activations cost nothing under this cap: their price, of whatever weights cost, is the same for each width.
    torch.testing.assert_close(idle, idle[:, :1].expand(3, 3))


@pytest.mark.parametrize("budget", ["peak_activation_bytes=w3a3", ("bitops=w3a3", "peak_activation_bytes=w8a8"), "weight_bytes=w3"])
def test_widths_that_no_policy_within_the_caps_has_are_forbidden(budget):
    given = problem(budget)
    possible = np.zeros((2, groups(given), len(WIDTHS)), dtype=bool)
    for weights, inputs, policy in policies(given):
        if not given.choices.budget.exceeded(given.network, policy):
            possible[0, range(groups(given)), weights] = possible[1, range(groups(given)), inputs] = True
    for price, some in zip(stated(given).prices(*random_logits(3, 2)), possible, strict=True):
        assert np.array_equal(price.isfinite(), some)
    assert not possible.all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("group", range(3))
@pytest.mark.parametrize("width", range(3))
def test_a_higher_logit_means_a_larger_share(side, group, width):
    cost, shares = stated(problem("bitops=0.5x")), []
    for more in (0.0, 0.5, 1.0):
        logits = random_logits(3, 3)
        logits[side][group, width] += more
        shares.append(float((logits[side] - cost.prices(*logits)[side]).softmax(1)[group, width]))
    assert shares[0] < shares[1] < shares[2]


def test_prices_have_the_dtype_of_the_logits():
    assert [price.dtype for price in stated(problem("bitops=w3a3")).prices(*(u.double() for u in random_logits(3, 0)))] == [
        torch.float64
    ] * 2


@pytest.mark.parametrize(
    ("budget", "candidates"),
    [
        ("bitops=0.01x", None),
        (("mean_weight_bits=2.1", "bitops=w2a2", "mean_activation_bits=1.9"), None),
        ("bitops=w3a3", (LayerBits(2, 8), LayerBits(8, 2))),  # 2/2 would fit, and is no candidate
        ("peak_activation_bytes=w1a1", None),
    ],
)
def test_a_budget_that_nothing_fits_is_refused_before_training(budget, candidates, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained for a budget that nothing fits")

    monkeypatch.setattr(mixture_search, "train", never)
    with pytest.raises(InfeasibleBudget):
        Differentiable(task="follow").search(problem(budget, candidates))
