from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitscape.policy import LayerBits
from bitscape.quant.layers import apply_layer
from bitscape.search.sensitivity import calls, calls_with_gradients, drawn_labels, layer_noise, monotone, score_table, widths

PAIRS = tuple(LayerBits(w, a) for w, a in product((2, 4, 8), (2, 8)))


def small_net(inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_widths_are_those_of_the_candidates() -> None:
    assert widths(PAIRS) == ([2, 4, 8], [2, 8])


def test_noise_falls_with_bits_and_the_input_of_a_relu_is_unsigned() -> None:
    noise = layer_noise(small_net(), ["0", "2", "6"], images(), PAIRS)
    sizes = [float(change.square().sum()) for change in noise["2"].weights.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 100 * sizes[-1]
    assert noise["2"].ranges[2][1].qmin == 0
    assert noise["0"].ranges[2][1].qmin == -2


def test_output_changes_are_those_of_the_quantized_layer() -> None:
    model = small_net()
    noise = layer_noise(model, ["2"], images(), PAIRS)["2"]
    (call,) = calls(model, ["2"], images())
    by_weight, by_input = noise.output_changes(call.input)
    weight = noise.layer.get_parameter("weight")
    with torch.no_grad():
        changed = apply_layer(noise.layer, call.input + noise.of_input(call.input, 2), weight + noise.weights[4])
        cross = apply_layer(noise.layer, noise.of_input(call.input, 2), noise.weights[4])
        bias = noise.layer.get_parameter("bias")[:, None, None]
    torch.testing.assert_close(changed + bias - call.output, by_weight[1] + by_input[0] + cross, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_are_those_at_the_layers_own_output(inplace: bool) -> None:
    graded = {c.name: c for c in calls_with_gradients(small_net(inplace), ["0"], images(), torch.Generator().manual_seed(0))}
    plain = {c.name: c for c in calls_with_gradients(small_net(), ["0"], images(), torch.Generator().manual_seed(0))}
    torch.testing.assert_close(graded["0"].output, plain["0"].output)
    torch.testing.assert_close(graded["0"].gradient, plain["0"].gradient)
    assert (plain["0"].output < 0).any()


def test_a_layer_that_runs_twice_is_seen_twice() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)
    assert [call.name for call in calls(model, ["1"], torch.randn(2, 1, 2, 2))] == ["1", "1"]


def test_labels_follow_the_softmax_and_the_seed() -> None:
    logits = torch.tensor([[2.0, 0.0, -30.0]]).repeat(4000, 1)
    labels = drawn_labels(logits, torch.Generator().manual_seed(0))
    assert torch.equal(labels, drawn_labels(logits, torch.Generator().manual_seed(0)))
    expected = 4000 * float(logits[0].softmax(0)[0])
    assert abs(int((labels == 0).sum()) - expected) < 120  # four standard deviations are 82
    assert not (labels == 2).any()


@given(st.lists(st.floats(0, 100), min_size=len(PAIRS), max_size=len(PAIRS)))
def test_repaired_scores_never_rise_with_bits_and_repair_is_idempotent(row: list[float]) -> None:
    repaired = monotone(np.array([row]), PAIRS)[0]
    for (i, less), (j, more) in product(enumerate(PAIRS), enumerate(PAIRS)):
        if more.weight >= less.weight and more.activation >= less.activation:
            assert repaired[j] <= repaired[i] + 1e-9
    np.testing.assert_allclose(monotone(repaired[None], PAIRS)[0], repaired)
    assert min(row) - 1e-9 <= repaired.min() and repaired.max() <= max(row) + 1e-9


def test_repairs_are_counted() -> None:
    falling = np.array([[9.0, 8.0], [5.0, 4.0], [3.0, 1.0]])
    assert score_table("m", PAIRS, {"a": falling}).repairs == 0
    rising = falling.copy()
    rising[2, 0] = 6.0  # 8/2 scores worse than 4/2
    table = score_table("m", PAIRS, {"a": falling, "b": rising})
    assert table.repairs == 2
    np.testing.assert_allclose(table.values[1], [9.0, 8.0, 5.5, 4.0, 5.5, 1.0])
