import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitscape.data.samples import Minibatch, Samples
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.problem import SearchProblem
from bitscape.searches.topological import Topological, birth_times, channel_entropy, chosen_samples, layer_entropy, square_maps

PAIRS = (LayerBits(2, 2), LayerBits(2, 8), LayerBits(4, 4), LayerBits(8, 8))


def _graph(nodes: int, *edges: tuple[int, int]) -> Tensor:
    """A map whose entries are these edges in descending order, in one triangle only, and negative elsewhere."""
    weights = torch.full((nodes, nodes), -1.0)
    for rank, (one, other) in enumerate(edges):
        weights[one, other] = len(edges) - rank
    return weights


def _brute(weights: Tensor) -> int:
    """The definition, edge by edge, with reachability searched anew for each."""
    nodes = len(weights)
    strength = {(i, j): float(max(weights[i, j], weights[j, i])) for i in range(nodes) for j in range(i + 1, nodes)}
    edges: set[frozenset[int]] = set()
    for rank, (i, j) in enumerate(sorted(strength, key=lambda edge: -strength[edge]), start=1):
        if strength[i, j] <= 0:
            return 0
        neighbors = {node: {other for edge in edges if node in edge for other in edge - {node}} for node in range(nodes)}
        reached, border = {i}, [i]
        while border:
            fresh = neighbors[border.pop()] - reached
            reached |= fresh
            border += fresh
        if j in reached and not neighbors[i] & neighbors[j]:
            return rank
        edges.add(frozenset((i, j)))
    return 0


@pytest.mark.parametrize(
    ("weights", "birth"),
    [
        (_graph(4, (0, 1), (1, 2), (2, 3), (0, 3)), 4),  # a square
        (_graph(4, (0, 1), (1, 2), (0, 2), (2, 3), (0, 3)), 0),  # triangles only
        (_graph(4, (0, 1), (2, 3), (1, 0), (1, 2), (0, 3)), 4),  # the other triangle's entry is no new edge
        (_graph(4, (0, 1), (1, 2), (2, 3)), 0),  # stops before the square closes
        (_graph(5, (0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (0, 4)), 6),  # a triangle first, then a square
        (_graph(5, (0, 1), (2, 3), (3, 4), (1, 2), (0, 4)), 5),  # two parts join before the pentagon closes
        (torch.diag(torch.arange(1.0, 5.0)), 0),  # the diagonal is no edge
    ],
)
def test_births_by_hand(weights: Tensor, birth: int) -> None:
    assert birth_times(weights[None]).tolist() == [birth] == [_brute(weights)]


@pytest.mark.parametrize("nodes", [4, 5, 8, 13])
def test_births_as_defined(nodes: int) -> None:
    generator = torch.Generator().manual_seed(nodes)
    noise = torch.randn(40, nodes, nodes, generator=generator)
    # A strong block around the diagonal makes many triangles: such maps need more than the first edges.
    block = (torch.arange(nodes) < nodes - 2).float()
    maps = torch.cat([noise, (noise - 1).relu(), noise.abs() + 9 * block * block[:, None]])
    assert birth_times(maps).tolist() == [_brute(weights) for weights in maps]


def test_a_hole_behind_more_edges_than_are_looked_at_first() -> None:
    clique = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    weights = _graph(14, *sorted(clique, key=lambda edge: edge[1]), (11, 12), (12, 13), (0, 13))
    assert birth_times(weights[None]).tolist() == [len(clique) + 3]


def test_maps_of_one_pixel_have_no_birth() -> None:
    assert birth_times(torch.ones(3, 1, 1)).tolist() == [0, 0, 0]


def test_entropy_by_hand() -> None:
    assert channel_entropy(np.array([5, 5, 7, 7])) == pytest.approx(math.log(2))
    assert channel_entropy(np.array([5, 5, 5, 0])) == 0.0
    assert channel_entropy(np.array([5, 0, 0, 7, 0, 0])) == pytest.approx(math.log(2))  # of the images with a birth
    assert channel_entropy(np.zeros(4, dtype=np.int64)) is None
    few = np.array([6, *[0] * 9])
    assert (channel_entropy(few), channel_entropy(np.array([*few, 0]))) == (0.0, None)  # 10 % counts, 9 % does not


def test_channels_without_births_are_left_out_of_the_mean() -> None:
    births = np.array([[4, 0, 5], [6, 0, 5]])
    assert layer_entropy(births) == pytest.approx(math.log(2) / 2)
    assert layer_entropy(births[:, 1:2]) == 0.0


def test_noise_alone_scores_by_the_side_of_the_map() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(side: int) -> float:
        return layer_entropy(birth_times(torch.randn(128 * 4, side, side, generator=generator).relu()).reshape(128, 4))

    assert noise(3) == 0.0
    assert noise(56) == pytest.approx(3.2, abs=0.1)


def test_maps_are_squared_at_their_center_and_rectified() -> None:
    output = torch.arange(10.0).reshape(1, 1, 2, 5) - 5
    maps = square_maps(output)
    assert maps is not None and maps.tolist() == [[[[0.0, 0.0], [1.0, 2.0]]]]
    assert square_maps(torch.zeros(2, 5)) is None


def test_images_of_one_label_are_chosen_if_there_are_enough() -> None:
    images, labels = torch.arange(6.0).reshape(6, 1, 1, 1), torch.tensor([0, 1, 0, 1, 1, 2])
    of_several_shapes = Samples([Minibatch(images[:4]), Minibatch(torch.cat([images[4:]] * 2, dim=3))])
    for samples in (Samples.of(images), of_several_shapes):
        assert _values(chosen_samples(samples, labels, 3)) == [1.0, 3.0, 4.0]
        assert _values(chosen_samples(samples, labels, 4)) == [0.0, 1.0, 2.0, 3.0]
        assert _values(chosen_samples(samples, None, 2)) == [0.0, 1.0]


def _values(samples: Samples) -> list[float]:
    return [float(sample.max()) for part in samples.parts for sample in part.inputs]


def _problem(weight: float = 1.0) -> SearchProblem:
    """Two convolutions that hand maps on (side 8, then 2) and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    ).eval()
    with torch.no_grad():
        model[0].weight.fill_(weight)
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([1.0, -1.0, 0.0]))  # the norm turns a map's sign, or switches it off
    return SearchProblem.of(model=model, samples=torch.randn(64, 1, 8, 8), budget="bitops=w4a4", candidates=PAIRS, pinned={})


def test_score_is_the_entropy_times_the_mean_width() -> None:
    problem = _problem()
    table = Topological(batch_size=24).score(problem)
    images = problem.samples.parts[0].inputs[:, 0]
    # The channel that the norm switches off has no births.
    entropies = [layer_entropy(birth_times(maps.relu())[:, None]) for maps in (images, -images)]
    assert min(entropies) > 0.5
    np.testing.assert_allclose(table.values[0], -np.mean(entropies) * np.array([2, 5, 4, 8]), rtol=1e-6)
    np.testing.assert_array_equal(table.values[1:], np.zeros((2, 4)))
    assert (table.layers, table.method, table.repairs) == (("0", "4", "7"), "topological", 0)


def test_control_knows_the_side_alone() -> None:
    table = Topological(map_side_only=True).score(_problem())
    np.testing.assert_allclose(table.values[:, 2], [-4 * math.log(8), -4 * math.log(2), 0.0])
    np.testing.assert_array_equal(Topological(map_side_only=True).score(_problem(weight=-3.0)).values, table.values)


def test_the_layer_with_entropy_gets_the_bits_that_the_budget_allows() -> None:
    result = Topological().search(_problem())
    bits = result.policy.layers
    assert bits["0"].weight + bits["0"].activation > bits["4"].weight + bits["4"].activation
    assert result.policy.cost["bitops"] <= result.policy.provenance["budget"]["bitops"]
    assert result.policy.provenance["method"] == "topological"


def test_no_image_is_refused() -> None:
    with pytest.raises(BitscapeError, match="images = 0"):
        Topological(images=0)
