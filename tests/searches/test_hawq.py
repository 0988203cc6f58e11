import numpy as np
import pytest
import torch
from torch import nn

from bitscape.policy import LayerBits
from bitscape.searches import hawq
from bitscape.searches.hawq import Hawq, hutchinson_traces
from bitscape.searches.problem import SearchProblem


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
    stated = SearchProblem.of(model=model, samples=torch.randn(16, 1, 4, 4), budget="mean_weight_bits=8", candidates=pairs, pinned={})
    table = Hawq().score(stated)
    assert np.isfinite(table.values).all()
    assert not any(p.grad is not None for p in stated.prepared.parameters())
    assert np.array_equal(table.values, Hawq().score(stated).values)


def test_a_variable_the_loss_does_not_use_has_no_curvature() -> None:
    x, unused, linear = (torch.ones(3, requires_grad=True) for _ in range(3))
    loss = (x * x).sum() + linear.sum()
    assert hutchinson_traces(loss, [x, unused, linear], 1, torch.Generator().manual_seed(0)) == [6.0, 0.0, 0.0]
    assert hutchinson_traces(loss, [unused], 1, torch.Generator().manual_seed(0)) == [0.0]


def test_every_call_of_a_shared_layer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hawq, "hutchinson_traces", lambda loss, variables, *_: [float(v[0].numel()) for v in variables])
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    pairs = (LayerBits(8, 2), LayerBits(8, 8))
    images = torch.randn(16, 1, 4, 4)

    def spread(model: nn.Module) -> float:
        stated = SearchProblem.of(model=model.eval(), samples=images, budget="mean_weight_bits=8", candidates=pairs, pinned={})
        scores = dict(zip(*[(t := Hawq().score(stated)).layers, t.values], strict=True))
        return float(scores["1"][0] - scores["1"][1])

    once = spread(nn.Sequential(nn.Flatten(), shared, nn.Linear(16, 3)))
    twice = spread(nn.Sequential(nn.Flatten(), shared, nn.Identity(), shared, nn.Linear(16, 3)))
    assert twice > 1.1 * once > 0
