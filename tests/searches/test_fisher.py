from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from bitscape.data.samples import Samples
from bitscape.engine.task import Classes
from bitscape.policy import LayerBits
from bitscape.quant.fold import fold_norms
from bitscape.searches.allocation import allocate
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.fisher import Fisher, Variant, pair_scores, weighted_products
from bitscape.searches.hawq import Hawq
from bitscape.searches.kl import Kl
from bitscape.searches.local import Local
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchProblem
from bitscape.searches.repaired import repaired_noise
from bitscape.searches.scores import ScoreTable
from bitscape.searches.sensitivity import GradedCall, layer_noise, monotone

pytestmark = pytest.mark.slow

PAIRS = tuple(LayerBits(w, a) for w, a in product((2, 4, 8), (2, 4, 8)))


def problem(model: nn.Module, images: torch.Tensor, **settings: object) -> SearchProblem:
    return SearchProblem.of(model=model, samples=images, budget="bitops=0.3x", candidates=PAIRS, pinned={}, **settings)


def linear_net(gain: float = 1.0) -> nn.Module:
    """Two layers alike, of which the first's error reaches the loss `gain` times as strongly as the second's."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(16, 5, bias=False), nn.Linear(16, 5, bias=False)
            with torch.no_grad():
                self.quiet.weight.copy_(self.loud.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return gain * self.loud(x.flatten(1)) + self.quiet(x.flatten(1))

    return Net().eval()


def images(n: int = 64) -> torch.Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_score_is_the_gradient_weighted_output_error_in_closed_form() -> None:
    layer = nn.Linear(16, 5, bias=False)
    noise = layer_noise(nn.Sequential(layer), ["0"], Samples.of(images().flatten(1)), PAIRS)["0"]
    x, draws = images(4).flatten(1), torch.randn(2, 4, 5)
    scores = pair_scores(GradedCall("0", x, tuple(draws)), noise, "elementwise", 1.0)
    by_weight, by_input = noise.output_changes(x)
    expected = [[float((draws * (w + a)).square().mean(0).sum()) for a in by_input] for w in by_weight]
    torch.testing.assert_close(scores, torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)
    along = pair_scores(GradedCall("0", x, tuple(draws)), noise, "directional", 1.0)
    expected = [[float((draws * (w + a)).sum(2).square().mean(0).sum()) for a in by_input] for w in by_weight]
    torch.testing.assert_close(along, torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)


def test_a_layer_that_matters_more_scores_higher_and_gets_more_bits() -> None:
    result = Fisher().search(problem(linear_net(gain=4.0), images()))
    loud, quiet = result.scores.values
    np.testing.assert_allclose(loud / quiet, 16.0, rtol=1e-3)  # scores are quadratic in the gradient
    assert result.policy.layers["loud"] > result.policy.layers["quiet"]


def test_for_training_counts_a_share_of_the_weight_noise() -> None:
    float_scores = Fisher().score(problem(linear_net(), images()))
    trained = Fisher(weight_share_for_training=0.0).score(problem(linear_net(), images()), for_training=True)
    by_pair = dict(zip(PAIRS, trained.values[0], strict=True))
    np.testing.assert_allclose(by_pair[LayerBits(2, 4)], by_pair[LayerBits(8, 4)])  # weight bits cost nothing now
    assert dict(zip(PAIRS, float_scores.values[0], strict=True))[LayerBits(2, 4)] > by_pair[LayerBits(2, 4)]


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("variant", ["elementwise", "directional"])
def test_same_seed_same_scores_and_neither_batches_nor_parts_matter(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    def values(size: int | None) -> NDArray[np.float64]:
        return Fisher(batch_size=size, variant=variant).score(problem(convolutions(), images())).values

    expected = values(None)
    assert np.array_equal(values(None), expected)
    monkeypatch.setattr("bitscape.searches.sensitivity.PART_ELEMENTS", 100)
    monkeypatch.setattr("bitscape.searches.fisher.CACHED_ELEMENTS", 7)
    for size in (None, 1, 16, 64):
        np.testing.assert_allclose(values(size), expected, rtol=1e-4)


@pytest.mark.parametrize("for_training", [False, True])
def test_scores_are_those_of_the_definition(for_training: bool) -> None:
    """Every layer's output changed by every pair in turn, and weighted by autograd's gradient at it."""
    model, x = convolutions(), images(8)
    table = Fisher(images=8, weight_share_for_training=0.25).score(problem(model, x), for_training=for_training)
    prepared = problem(model, x).prepared
    run, noise_of = (prepared, layer_noise) if for_training else (fold_norms(prepared, x[:2]), repaired_noise)
    noises, root = noise_of(run, list(table.layers), Samples.of(x), PAIRS), 0.5 if for_training else 1.0
    losses = lambda y: Classes().drawn_losses(y, torch.Generator().manual_seed(0), draws=4).sum(1)  # noqa: E731
    for name, row in zip(table.layers, table.values, strict=True):
        at, noise = int(name), noises[name]
        with torch.no_grad():
            before = run[:at](x)
            output = run[at](before)
            by_weight, by_input = noise.output_changes(before)
        output.requires_grad_()
        by_draw = losses(run[at + 1 :](output.clone())).unbind()
        gradients = torch.stack([torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in by_draw])
        scores = [
            [float((gradients * (root * w + a)).double().square().sum()) / 32 for a in by_input] for w in by_weight
        ]
        np.testing.assert_allclose(row, monotone(np.array(scores).reshape(1, -1), PAIRS)[0], rtol=1e-4)


def test_a_saved_table_is_solved_for_any_budget(tmp_path: Path) -> None:
    stated = problem(linear_net(), images())
    result = Fisher().search(stated)
    result.scores.save(tmp_path / "scores.json")
    table = ScoreTable.load(tmp_path / "scores.json")
    assert dict(allocate(table, stated.choices).layers) == dict(result.policy.layers)


def test_real_network_and_images_give_the_sensitive_layers_more_bits(shared_data: Path) -> None:
    from bitscape.data.sources import load_dataset
    from recipes.networks import WEIGHTS, load

    data = load_dataset(str(shared_data / "cifar10_test.parquet"), limit=64)
    stated = SearchProblem.of(
        model=load("resnet20", shared_data), samples=WEIGHTS["resnet20"].normalization.apply(data.images), budget="bitops=w3a3"
    )
    result = Fisher(images=64).search(stated)
    assert result.policy.cost["bitops"] <= stated.choices.budget.caps["bitops"]
    totals = dict(zip(result.scores.layers, result.scores.values.mean(1), strict=True))
    # A second convolution of the last block changes the logits least: it is followed by the average over the map.
    assert totals["layer3.2.conv2"] < totals["layer1.0.conv1"]


def test_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="images"):
        problem(linear_net(), images()[:0])


def test_pairs_of_a_one_channel_convolution_are_those_of_the_plain_sum() -> None:
    # Its outputs may lie in memory otherwise than its inputs' noise: inner products must not mix the orders.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 8, 8)
    noise = layer_noise(model, ["0"], Samples.of(x), PAIRS)["0"]
    g = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    by_weight, by_input = noise.output_changes(x)
    expected = torch.tensor([[float((g * (w + a)).square().sum()) for a in by_input] for w in by_weight])
    for memory_format in (torch.channels_last, torch.contiguous_format):
        mixed = [by_weight[0].contiguous(memory_format=memory_format), *by_weight[1:]]
        gram = weighted_products([*mixed, *by_input], g)
        scores = gram.diagonal()[:3, None] + gram.diagonal()[None, 3:] + 2 * gram[:3, 3:]
        torch.testing.assert_close(scores, expected.double(), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Frozen, one layer called by keyword, and one whose output nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.named, self.unused = nn.Linear(16, 8), nn.Linear(8, 5), nn.Linear(16, 3)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x.flatten(1))
        return self.named(input=self.first(x.flatten(1)).relu())


@pytest.mark.parametrize("method", [Fisher(), Local(), Kl(), Hawq()])
def test_odd_networks_are_scored_too(method: SearchMethod) -> None:
    table = method.score(problem(Odd(), images()))
    scores = dict(zip(table.layers, table.values, strict=True))
    assert np.isfinite(table.values).all() and scores["named"].max() > 0
    if not isinstance(method, Local):  # it does not look at the network's output
        assert scores["unused"].max() == 0


@pytest.mark.parametrize("method", [Fisher(), Local(), Kl(), Hawq()])
def test_nothing_to_decide_gives_the_pinned_policy(method: SearchMethod) -> None:
    pinned = {"loud": LayerBits(4, 4), "quiet": LayerBits(2, 2)}
    stated = SearchProblem.of(model=linear_net(), samples=images(), budget="bitops=0.5x", candidates=PAIRS, pinned=pinned)
    assert dict(method.search(stated).policy.layers) == pinned
    assert method.score(stated).values.shape == (0, len(PAIRS))
    with pytest.raises(InfeasibleBudget):
        method.search(SearchProblem.of(model=linear_net(), samples=images(), budget="bitops=100", candidates=PAIRS, pinned=pinned))


@pytest.mark.parametrize(
    "last",
    [
        lambda: [nn.Linear(8, 1)],
        lambda: [nn.Linear(8, 1), nn.Sigmoid()],
        lambda: [nn.Linear(8, 1), nn.Flatten(0)],
        lambda: [nn.Conv2d(8, 1, 1)],
    ],
    ids=["linear", "sigmoid", "flat", "conv"],
)
@pytest.mark.parametrize("method", [Fisher(), Kl(), Hawq()])
def test_one_output_is_scored_by_how_far_it_moves(method: Fisher | Kl | Hawq, last: Callable[[], list[nn.Module]]) -> None:
    torch.manual_seed(0)
    end = last()
    body = [nn.Conv2d(3, 8, 3), nn.ReLU()]
    middle = [] if isinstance(end[0], nn.Conv2d) else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    images = torch.randn(16, 3, 6, 6)
    pairs = (LayerBits(2, 8), LayerBits(8, 8))
    model = nn.Sequential(*body, *middle, *end)
    stated = SearchProblem.of(model=model, samples=images, budget="weight_bytes=w8", candidates=pairs, pinned={})
    values = method.score(stated).values
    assert (values[:, 0] > 10 * values[:, 1]).all() and (values[:, 1] >= 0).all()


def test_scores_of_a_linear_regression_are_half_the_squared_change_of_its_outputs() -> None:
    """Fisher's score is the expected (sum of G dY)^2: for one linear layer G is a random sign over the spread."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), torch.randn(64, 3, 2, 2)
    stated = SearchProblem.of(model, images, "weight_bytes=w8", candidates=(LayerBits(2, 8),), pinned={}, task="follow")
    noise = repaired_noise(model, ["1"], Samples.of(images), stated.choices.candidates)["1"]
    by_weight, by_input = noise.output_changes(images.flatten(1))
    expected = (by_weight[0] + by_input[0]).square().sum(1).mean() / model(images).detach().var(unbiased=False)
    assert Fisher().score(stated).values[0, 0] == pytest.approx(float(expected), rel=1e-4)
