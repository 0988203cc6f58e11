import gc
import weakref
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitscape.cost.budget import Budget
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine.task import Classes
from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.models.products import MatMul
from bitscape.policy import LayerBits, fingerprint
from bitscape.quant.layers import apply_layer
from bitscape.searches.allocation import allocate
from bitscape.searches.choices import Choices
from bitscape.searches.fisher import Fisher
from bitscape.searches.hawq import Hawq
from bitscape.searches.kl import Kl
from bitscape.searches.local import Local
from bitscape.searches.problem import SearchProblem
from bitscape.searches.sensitivity import (
    GradedCall,
    calls,
    candidate_widths,
    images_a_pass,
    layer_noise,
    monotone,
    score_table,
    visit_gradients,
)
from tests.searches.small import layer, network

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
    assert candidate_widths(PAIRS) == ([2, 4, 8], [2, 8])


def test_noise_falls_with_bits_and_the_input_of_a_relu_is_unsigned() -> None:
    noise = layer_noise(small_net(), ["0", "2", "6"], Samples.of(images()), PAIRS)
    sizes = [float(change.square().sum()) for change in noise["2"].weights.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 100 * sizes[-1]
    assert noise["2"].ranges[2][1].qmin == 0
    assert noise["0"].ranges[2][1].qmin == -2


def test_output_changes_are_those_of_the_quantized_layer() -> None:
    model = small_net()
    noise = layer_noise(model, ["2"], Samples.of(images()), PAIRS)["2"]
    (call,) = calls(model, ["2"], images())
    by_weight, by_input = noise.output_changes(call.input)
    weight = noise.layer.get_parameter("weight")
    with torch.no_grad():
        changed = apply_layer(noise.layer, call.input + noise.of_input(call.input, 2), weight + noise.weights[4])
        cross = apply_layer(noise.layer, noise.of_input(call.input, 2), noise.weights[4])
        bias = noise.layer.get_parameter("bias")[:, None, None]
    torch.testing.assert_close(changed + bias - call.output, by_weight[1] + by_input[0] + cross, rtol=1e-4, atol=1e-5)


def visited(model: nn.Module, names: list[str], x: torch.Tensor, generator: torch.Generator) -> list[GradedCall]:
    seen: list[GradedCall] = []
    visit_gradients(model, names, Minibatch(x), Classes(), generator, seen.append, draws=2)
    return seen


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_are_those_at_the_layers_own_output(inplace: bool) -> None:
    model, x, generator = small_net(inplace), images(), torch.Generator().manual_seed(0)
    (seen,) = visited(model, ["0"], x, generator)
    with torch.enable_grad():
        output = model[0](x).detach().requires_grad_()
        losses = Classes().drawn_losses(model[1:](output.clone()), torch.Generator().manual_seed(0), draws=2).sum(1)
    for gradient, loss in zip(seen.gradients, losses, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, output, retain_graph=True)[0])
    torch.testing.assert_close(seen.input, x)
    assert (output < 0).any()


def test_nothing_of_a_batch_stays_in_memory() -> None:
    def of_one_batch() -> weakref.ref[Callable[[GradedCall], None]]:
        def visit(call: GradedCall) -> None:
            """Is held by the graph, as long as there is one."""

        model, generator = small_net(), torch.Generator().manual_seed(0)
        batch = Minibatch(images(), None)
        visit_gradients(model, list(layer_shapes(model)), batch, Classes(), generator, visit, draws=2)
        return weakref.ref(visit)

    held = of_one_batch()
    gc.collect()
    assert held() is None


def test_a_layer_that_runs_twice_is_seen_twice() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)
    assert [call.name for call in calls(model, ["1"], torch.randn(2, 1, 2, 2))] == ["1", "1"]


class Returning(nn.Module):
    """A network whose answer is `wrap` of the logits."""

    def __init__(self, wrap: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.net, self.wrap = small_net(), wrap

    def forward(self, x: torch.Tensor) -> object:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda y: "logits", "it returns no tensor but str"),
        (lambda y: {"best": y.argmax(1)}, "no floating-point tensor"),
        (lambda y: y[:3, :3], r"output output0 has shape \(3, 3\) for 6 images"),
        (lambda y: torch.where(y == y[-1], torch.inf, y), r"the model's outputs of image 5 are not finite"),
        (lambda y: y * torch.nan, r"outputs (of image 0 are not finite|on it hold NaN)"),
    ],
)
@pytest.mark.parametrize("method", [Fisher, Hawq, Kl])
def test_answers_that_are_no_finite_tensor_are_told(
    method: type[Fisher | Hawq | Kl], wrap: Callable[[torch.Tensor], object], message: str
) -> None:
    stated = SearchProblem.of(model=Returning(wrap), samples=images(), budget="mean_weight_bits=8", candidates=PAIRS)
    with pytest.raises(BitscapeError, match=message):
        method().score(stated)


@pytest.mark.parametrize("method", [Fisher, Hawq])
def test_a_network_that_lets_no_gradient_through_is_told(method: type[Fisher | Hawq]) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.net(x)

    stated = SearchProblem.of(model=Cut(), samples=images(), budget="mean_weight_bits=8", candidates=PAIRS)
    with pytest.raises(BitscapeError, match=r"layer net\.2: no gradient .*no_grad.*kl or local"):
        method().score(stated)


class Odd(nn.Module):
    """A layer called by keyword, one whose output nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.named, self.unread, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.named(input=x.flatten(1))
        self.unread(x)
        return self.head(x)


def test_a_layer_called_by_keyword_is_visited_and_one_that_nothing_uses_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    (seen,) = visited(Odd(), ["named", "unread"], torch.randn(2, 1, 2, 2, generator=generator), generator)
    assert seen.name == "named" and seen.input.shape == (2, 4) and all(g.any() for g in seen.gradients)


@pytest.mark.parametrize("method", [Fisher, Hawq, Kl, Local])
def test_tables_carry_the_networks_fingerprint_and_serve_no_other(method: type[Fisher | Hawq | Kl | Local]) -> None:
    stated = SearchProblem.of(model=small_net(), samples=images(), budget="mean_weight_bits=8", candidates=PAIRS)
    table = method().score(stated)
    assert table.fingerprint == fingerprint(layer_shapes(small_net()))
    wider = small_net()
    wider[6] = nn.Linear(8, 5)
    other = SearchProblem.of(model=wider, samples=images(), budget="mean_weight_bits=8", candidates=PAIRS)
    with pytest.raises(BitscapeError, match=r"scores: they are of a network with fingerprint .* this one has"):
        allocate(table, other.choices)


def test_a_pass_takes_as_many_images_as_the_layers_outputs_allow() -> None:
    # 2 x 2^20 outputs of an image in float32 are 8 MB: 16 of them are 128 MB.
    assert images_a_pass(network(layer("a", outputs=2**20), layer("b", outputs=2**20)), draws=4) == 8
    assert images_a_pass(network(layer("a", outputs=2**30)), draws=1) == 1


def test_a_run_is_cut_into_parts_only_where_its_first_dimension_counts_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitscape.searches.sensitivity.PART_ELEMENTS", 1)
    conv, linear, product = nn.Conv2d(3, 3, 1), nn.Linear(3, 3), MatMul()
    x, unbatched, row, square = torch.randn(4, 3, 2, 2), torch.randn(3, 2, 2), torch.randn(3), torch.randn(2, 2)
    parts = list(GradedCall("", x, (-x,)).parts(conv))
    assert torch.equal(torch.cat([part.input for part in parts]), x) and len(parts) == 4
    assert torch.equal(torch.cat([part.gradients[0] for part in parts]), -x)
    assert [len(list(GradedCall("", t, (t,)).parts(layer))) for t, layer in ((unbatched, conv), (row, linear))] == [1, 1]
    assert len(list(GradedCall("", x, (x,), second=x).parts(product))) == 4
    assert len(list(GradedCall("", x, (x,), second=x[:1]).parts(product))) == 1
    assert len(list(GradedCall("", square, (square,), second=square).parts(product))) == 1


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
    choices = Choices.of(network(layer("a"), layer("b")), Budget(), candidates=PAIRS, pinned={})
    assert score_table("m", choices, {"a": falling}).repairs == 0
    rising = falling.copy()
    rising[2, 0] = 6.0  # 8/2 scores worse than 4/2
    table = score_table("m", choices, {"a": falling, "b": rising})
    assert table.repairs == 2
    np.testing.assert_allclose(table.values[1], [9.0, 8.0, 5.5, 4.0, 5.5, 1.0])
