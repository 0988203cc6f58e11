import numpy as np
import pytest
import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.policy import LayerBits
from bitscape.searches.local import Local, relative_errors, upper_mean
from bitscape.searches.problem import SearchProblem
from bitscape.searches.sensitivity import LayerCall, layer_noise

PAIRS = (LayerBits(2, 2), LayerBits(4, 4), LayerBits(8, 8))


def test_relative_error_in_closed_form() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 5, bias=False), torch.randn(4, 16)
    noise = layer_noise(nn.Sequential(layer), ["0"], Samples.of(x), PAIRS)["0"]
    with torch.no_grad():
        errors = relative_errors(LayerCall("0", x, layer(x)), noise)
        by_weight, by_input = noise.output_changes(x)
        expected = (by_weight[0] + by_input[1]).norm(dim=1) / layer(x).norm(dim=1)
    torch.testing.assert_close(errors[0, 1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pairs", [2, 50])
def test_upper_mean_adds_the_spread_over_images_however_many_they_are(pairs: int) -> None:
    np.testing.assert_allclose(upper_mean(torch.tensor([1.0, 3.0] * pairs)), 2 + 1 / np.sqrt(0.05), rtol=1e-6)


def test_output_is_taken_behind_the_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.randn(8, 1, 4, 4)
    stated = SearchProblem.of(model=model, samples=x, budget="mean_weight_bits=8", candidates=PAIRS, pinned={})
    before = Local().score(stated).values[0]
    with torch.no_grad():
        # Only a channel the norm switches off gets noisy: its error must not count.
        model[1].weight[0], model[0].weight[0] = 0.0, torch.linspace(-50, 50, 9).reshape(1, 3, 3)
    after = Local().score(SearchProblem.of(model=model, samples=x, budget="mean_weight_bits=8", candidates=PAIRS, pinned={})).values[0]
    assert after[0] < 2 * before[0]
