import math

import pytest
import torch

from bitscape.dynamic.heads import Head, bounded, gumbel


@pytest.mark.parametrize("start", [3.5, 8.0])
@pytest.mark.parametrize("decisions", [1, 2])
def test_a_new_head_says_its_start_whatever_it_sees(decisions: int, start: float) -> None:
    head = Head(6, decisions, start)
    middle, deviation = head(torch.randn(5, 6))
    assert middle.shape == deviation.shape == (5, decisions)
    assert bool((middle == start).all()) and bool((deviation > 0).all())
    assert float(deviation.detach().max() - deviation.detach().min()) == 0


def test_middle_and_deviation_by_hand() -> None:
    head = Head(2, 2, 4.0)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0], [0, -1], [2, 0], [0, 0]]))
        head.linear.bias.copy_(torch.tensor([3.0, 5, 0, -40]))
        head.center.copy_(torch.tensor([1.0, 2]))
        head.spread.copy_(torch.tensor([0.5, 4]))
    middle, deviation = (each.detach() for each in head(torch.tensor([[2.0, 6.0], [1.0, 2.0]])))
    torch.testing.assert_close(middle, torch.tensor([[5.0, 4], [3, 5]]))  # standardized: (2, 1) and (0, 0)
    least = float(deviation[0, 1])
    assert least > 0
    softplus = torch.tensor([math.log1p(math.exp(4)), math.log(2)])
    torch.testing.assert_close(deviation[:, 0] - least, softplus)
    torch.testing.assert_close(deviation[:, 1], torch.full((2,), least))


def test_standardized_features_have_mean_zero_and_deviation_one() -> None:
    head, seen = Head(3, 1, 4.0), []
    head.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.7, 3.0, 100.0]) + 5
    head.standardize(features)
    head(features)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].std(0, correction=0), torch.ones(3))


def test_a_feature_that_did_not_vary_stays_small_when_it_does() -> None:
    # The share of the cost spent is the same for all images at calibration, and differs in training.
    head, seen = Head(1, 1, 4.0), []
    head.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    head.standardize(torch.full((8, 1), 0.5))
    head(torch.tensor([[0.5], [0.25]]))
    assert float(seen[0][0]) == 0 and 0 < float(seen[0].abs().max()) < 100


def test_what_standardizes_travels_with_the_state_and_is_not_trained() -> None:
    head, other = Head(2, 1, 4.0), Head(2, 1, 8.0)
    head.standardize(torch.randn(9, 2) * 3 + 1)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.center, head.center) and torch.equal(other.spread, head.spread)
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}


def test_bounded_limits_values_exactly() -> None:
    x = torch.tensor([-3.0, 2.0, 2.5, 8.0, 11.0])
    assert torch.equal(bounded(x, 2, 8), torch.tensor([2.0, 2.0, 2.5, 8.0, 8.0]))


@pytest.mark.parametrize(
    ("x", "slope", "kept"),
    [
        (1.0, 0.7, 0.0),  # descent goes further below
        (1.0, -0.7, -0.7),  # and here back up
        (9.0, 0.7, 0.7),
        (9.0, -0.7, 0.0),
        (2.0, 0.7, 0.7),  # the ends are inside
        (8.0, -0.7, -0.7),
        (5.0, 0.7, 0.7),
        (5.0, -0.7, -0.7),
    ],
)
def test_a_slope_is_kept_where_descent_leads_back_inside(x: float, slope: float, kept: float) -> None:
    at = torch.tensor([x], requires_grad=True)
    (slope * bounded(at, 2, 8)).sum().backward()
    torch.testing.assert_close(at.grad, torch.tensor([kept]))


def test_descent_brings_back_what_is_far_outside() -> None:
    x = torch.tensor([-5.0, 20.0], requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad((bounded(x, 2, 8) - 4).square().sum(), x)
        x = (x - 0.1 * gradient).detach().requires_grad_()
    torch.testing.assert_close(x.detach(), torch.full((2,), 4.0), atol=1e-3, rtol=0)


def test_gumbel_samples_lie_above_a_half_as_often_as_their_share_says_and_rise_with_it() -> None:
    torch.manual_seed(0)
    share = torch.full((20_000,), 0.3, requires_grad=True)
    drawn = gumbel(share)
    assert float((drawn > 0.5).float().mean()) == pytest.approx(0.3, abs=0.01)  # three standard deviations of a count
    (slope,) = torch.autograd.grad(drawn.sum(), share)
    torch.testing.assert_close(slope, drawn * (1 - drawn) / (0.3 * 0.7))
    assert bool(gumbel(torch.tensor([0.0, 1.0], requires_grad=True)).isfinite().all())
