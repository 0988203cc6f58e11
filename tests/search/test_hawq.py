import numpy as np
import pytest
import torch
from torch import nn

from bitscape.policy import LayerBits
from bitscape.search.hawq import Hawq, hutchinson_traces
from bitscape.search.problem import SearchProblem


def test_trace_of_a_quadratic_is_exact_for_a_diagonal_hessian() -> None:
    x, y = torch.ones(6, requires_grad=True), torch.ones(2, requires_grad=True)
    curvature = torch.arange(1.0, 7.0)
    loss = 0.5 * (curvature * x * x).sum() + 3 * (y * y).sum()
    traces = hutchinson_traces(loss, [x, y], probes=1, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(traces, [21.0, 12.0], rtol=1e-6)


def test_trace_converges_with_probes() -> None:
    torch.manual_seed(0)
    root = torch.randn(20, 20)
    hessian = root @ root.T
    x = torch.randn(20, requires_grad=True)
    loss = 0.5 * x @ hessian @ x
    (trace,) = hutchinson_traces(loss, [x], probes=400, generator=torch.Generator().manual_seed(0))
    assert trace == pytest.approx(float(hessian.trace()), rel=0.1)


def test_scores_fall_with_bits_and_do_not_touch_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    pairs = (LayerBits(2, 2), LayerBits(4, 4), LayerBits(8, 8))
    stated = SearchProblem(model=model, images=torch.randn(16, 1, 4, 4), budget="mean_weight_bits=8", candidates=pairs, pinned={})
    table = Hawq().score(stated)
    assert np.isfinite(table.values).all()
    assert not any(p.grad is not None for p in stated.prepared.parameters())
    assert np.array_equal(table.values, Hawq().score(stated).values)
