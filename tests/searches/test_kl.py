import numpy as np
import torch
from torch import nn

from bitscape.policy import LayerBits
from bitscape.searches.kl import Kl
from bitscape.searches.problem import SearchProblem

PAIRS = (LayerBits(2, 2), LayerBits(8, 2), LayerBits(2, 8), LayerBits(8, 8))


def test_scores_are_those_of_networks_with_one_layer_quantized_and_the_model_is_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    stated = SearchProblem.of(model=model, samples=torch.randn(32, 1, 4, 4), budget="mean_weight_bits=8", candidates=PAIRS, pinned={})
    before = {name: value.clone() for name, value in stated.prepared.state_dict().items()}
    table = Kl().score(stated)
    assert all(torch.equal(before[name], value) for name, value in stated.prepared.state_dict().items())
    low, weight_high, input_high, high = table.values[0]
    np.testing.assert_allclose(low + high, weight_high + input_high)  # weight and input are scored apart
    assert low > high >= 0
