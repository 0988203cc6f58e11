import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bitscape.data.samples import Samples
from bitscape.engine.user_task import User
from bitscape.policy import LayerBits, Policy
from bitscape.searches.allocation import allocate
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.mixed_network import mixed_network
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import proxy_task
from bitscape.searches.readout import LEAN, Progress, _offered, _rescored, _without, leaning, probability_scores, read_out
from tests.searches.small import square
from tests.sharpness.small import batch, float_net

pytestmark = pytest.mark.slow

WIDTHS = (2, 4, 8)
IMAGES = 30


def problem(**settings):
    images, labels = batch(IMAGES)
    usual = {"samples": Samples.of(images, labels), "budget": "bitops=1x", "candidates": square(*WIDTHS), "pinned": {}}
    return SearchProblem.of(model=float_net(), **{**usual, **settings})


def case(name="labels", **settings):
    """A problem, its task and the network with logits of their own."""
    given = problem(**settings)
    task = proxy_task(given, name, batch_size=8, head_epochs=1, folder=None)
    network = mixed_network(given, task.model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for logits in network.logits():
            logits.copy_(torch.randn(len(logits), generator=generator))
    network.keep_budget()
    return given, task, network


def set_logits(mixtures, *rows):
    with torch.no_grad():
        for mixture, row in zip(mixtures, rows, strict=True):
            mixture.logits.copy_(torch.tensor(row))


def of(table, layer, weight, activation):
    return table.values[table.layers.index(layer), table.candidates.index(LayerBits(weight, activation))]


class TestProbability:
    def test_the_score_of_a_pair_is_minus_the_log_of_both_shares(self):
        given, _, network = case()
        set_logits(network.weights, [0.0, 1.0, 3.0], [1.0, 1.5, 2.0], [0.0, 0.0, 5.0])
        set_logits(network.inputs, [-1.0, 0.0, 1.0], [0.0, 0.1, 0.2], [3.0, 4.0, 9.0])
        table = probability_scores(given, "differentiable", network)
        assert table.layers == ("0", "4", "6") and table.method == "differentiable" and table.repairs == 0
        weights = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in ([0, 1, 3], [1, 1.5, 2], [0, 0, 5])]
        inputs = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in ([-1, 0, 1], [0, 0.1, 0.2], [3, 4, 9])]
        for at, layer in enumerate(table.layers):
            for w, a in product(range(3), range(3)):
                assert of(table, layer, WIDTHS[w], WIDTHS[a]) == pytest.approx(-math.log(weights[at][w] * inputs[at][a]), rel=1e-6)

    def test_the_price_does_not_count(self):
        given, _, network = case()
        before = probability_scores(given, "m", network).values
        network.weights[0].price.copy_(torch.tensor([0.0, 1.0, 2.0]))
        assert np.array_equal(probability_scores(given, "m", network).values, before)

    def test_tied_layers_share_the_score_of_their_group(self):
        given, _, network = case(tied=[("0", "6")])
        set_logits(network.weights, [0.0, 1.0, 3.0], [0.0, 1.0, 3.0])
        set_logits(network.inputs, [0.0, 1.0, 3.0], [0.0, 1.0, 3.0])
        table = probability_scores(given, "m", network)
        for pair in table.candidates:
            first, alone, other = (of(table, layer, pair.weight, pair.activation) for layer in ("0", "4", "6"))
            assert first == other and first + other == pytest.approx(alone)

    def test_candidates_need_not_be_every_pair(self):
        pairs = (LayerBits(2, 4), LayerBits(8, 4), LayerBits(8, 8))
        given, _, network = case(candidates=pairs)
        set_logits(network.weights, *[[0.0, 2.0]] * 3)
        set_logits(network.inputs, *[[0.0, 1.0]] * 3)
        table = probability_scores(given, "m", network)
        assert table.candidates == pairs
        p, q = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(1))
        expected = [-math.log(p * q), -math.log((1 - p) * q), -math.log((1 - p) * (1 - q))]
        assert table.values[0].tolist() == pytest.approx(expected, rel=1e-6)


class TestLeaning:
    def test_scores_that_fall_stay_and_others_are_levelled_by_hand(self):
        assert leaning(np.array([3.0, 2.0, 1.5])).tolist() == pytest.approx([3.0, 2.0, 1.5], abs=1e-8)
        # Largest from here on: 2, 2, 1. Smallest so far: 0, 0, 0.
        assert leaning(np.array([0.0, 2.0, 1.0])).tolist() == pytest.approx([1.0, 1.0, 0.5], abs=1e-8)

    @pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    def test_they_always_fall_if_by_next_to_nothing(self, scores):
        steps = np.diff(leaning(np.array(scores)))
        assert (steps < 0).all() and (steps <= -LEAN / 2).all()

    def test_where_bits_are_free_the_most_are_taken(self):
        given, _, network = case(budget=("bitops=1x", "mean_weight_bits=w8"))
        set_logits(network.weights, *[[0.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
        set_logits(network.inputs, *[[0.0, 0.0, 0.0]] * 3)
        policy = allocate(probability_scores(given, "m", network), given.choices)
        assert set(policy.layers.values()) == {LayerBits(8, 8)}


def own_loss(network, given, task, logits=None):
    """The loss by hand: one pass over all images, and with other logits in one mixture."""
    model = copy.deepcopy(network.model).eval()
    if logits is not None:
        dict(model.named_parameters())[logits[0]].data.copy_(logits[1])
    with torch.no_grad():
        return float(task.loss.for_batch(given.samples.parts[0].inputs)(model(given.samples.parts[0].inputs), task.data.targets))


def names_of_logits(network):
    named = {id(parameter): name for name, parameter in network.model.named_parameters()}
    return [[named[id(mixture.logits)] for mixture in side] for side in (network.weights, network.inputs)]


@pytest.mark.parametrize("readout", ["drop-one", "keep-one"])
class TestRescored:
    @pytest.mark.parametrize("task_name", ["labels", "follow"])
    def test_rows_are_brute_force_losses(self, readout, task_name):
        given, task, network = case(task_name, tied=[("0", "6")])
        found = _rescored(readout, network, task)
        whole = own_loss(network, given, task)
        for side, rows, names in zip((network.weights, network.inputs), found, names_of_logits(network), strict=True):
            assert rows.shape == (2, 3)
            for mixture, row, name in zip(side, rows, names, strict=True):
                for at, score in enumerate(row):
                    places = torch.arange(3)
                    gone = places == at if readout == "drop-one" else places != at
                    other = own_loss(network, given, task, (name, mixture.logits.detach().masked_fill(gone, -torch.inf)))
                    assert score == pytest.approx(whole - other if readout == "drop-one" else other - whole, abs=1e-6)

    def test_the_table_adds_both_sides(self, readout):
        given, task, network = case()
        by_weight, by_input = _rescored(readout, network, task)
        table = read_out(readout, given, "seam", network, task)
        assert table.method == "seam"
        for at, layer in enumerate(("0", "4", "6")):
            for (w, weight), (a, activation) in product(enumerate(WIDTHS), enumerate(WIDTHS)):
                pair = leaning(by_weight[at])[w] + leaning(by_input[at])[a]
                assert of(table, layer, weight, activation) == pytest.approx(pair, abs=1e-7)

    def test_the_network_is_as_before(self, readout):
        given, task, network = case()
        network.model.train()
        before = copy.deepcopy(network.model.state_dict())
        read_out(readout, given, "seam", network, task)
        assert network.model.training and all(parameter.grad is None for parameter in network.model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())

    def test_forbidden_widths_are_as_good_as_the_best_below(self, readout):
        given, task, network = case(budget=("bitops=1x", "peak_activation_bytes=w8a4"))
        forbidden = [mixture.price.isinf() for mixture in network.inputs]
        assert [mask.tolist() for mask in forbidden] == [[False, False, True], [False, False, False], [False, False, False]]
        _, rows = _rescored(readout, network, task)
        assert np.isfinite(rows).all() and rows[0, 2] == rows[0, :2].min()
        table = read_out(readout, given, "m", network, task)
        assert of(table, "0", 8, 8) <= of(table, "0", 8, 4)


def test_the_loss_is_the_users_on_the_outputs_as_they_come():
    images, labels = batch(IMAGES)
    own = User(lambda outputs, targets: (outputs[:, 0] - targets["level"]).abs())
    given, task, network = case(samples=Samples.of({"input": images}, {"level": labels.float()}), task=own)
    rows, _ = _rescored("keep-one", network, task)
    model = copy.deepcopy(network.model).eval()
    with torch.no_grad():
        whole = float((model(images)[:, 0] - labels).abs().mean())
        model[0].weight_quantizer.logits[1:] = -torch.inf
        other = float((model(images)[:, 0] - labels).abs().mean())
    assert rows[0, 0] == pytest.approx(other - whole, abs=1e-6)
    assert given.meaning is own and task.name == "labels"


def test_a_single_allowed_width_has_nothing_to_lose():
    _, task, network = case(budget="mean_weight_bits=2")
    rows, _ = _rescored("drop-one", network, task)
    assert [mixture.price.isfinite().tolist() for mixture in network.weights] == [[True, False, False]] * 3
    assert not rows.any()


def test_a_failure_puts_the_logits_back():
    _, _, network = case()
    mixture = network.weights[1]
    before = mixture.logits.detach().clone()
    with pytest.raises(KeyError), _without(mixture, [0, 2]):
        assert mixture.shares.tolist() == [0, 1, 0]
        raise KeyError
    assert torch.equal(mixture.logits, before)


def test_at_most_so_many_images_count(monkeypatch):
    given, task, network = case()
    monkeypatch.setattr("bitscape.searches.readout.READ_IMAGES", 10)  # batches of 8 and of 2
    rows, _ = _rescored("drop-one", network, task)
    with torch.no_grad():
        model = copy.deepcopy(network.model).eval()
        whole = float(cross_entropy(model(given.samples.parts[0].inputs[:10]), given.labels[:10]))
        model[0].weight_quantizer.logits[0] = -torch.inf
        other = float(cross_entropy(model(given.samples.parts[0].inputs[:10]), given.labels[:10]))
    assert rows[0, 0] == pytest.approx(whole - other, abs=1e-6)


class TestProgress:
    def test_the_policy_so_far_is_in_the_folder_and_counts_what_changed(self, tmp_path):
        given, _, network = case(budget="bitops=w4a4")
        progress = Progress(given, Differentiable(), network, tmp_path)
        records = [progress.after_epoch(1), progress.after_epoch(2)]
        first = Policy.load(tmp_path / "policy.json")
        assert not given.choices.budget.exceeded(given.network, first)
        set_logits(network.weights, [9.0, 0.0, 0.0], [0.0, 0.0, 9.0], [0.0, 9.0, 0.0])
        records.append(progress.after_epoch(3))
        second = Policy.load(tmp_path / "policy.json")
        assert [record["layers_changed"] for record in records] == [3.0, 0.0, len(first.difference(second))]
        assert first.layers != second.layers and second == progress.policy
        assert records[2]["expected_bitops"] == network.expected_cost()["bitops"]

    def test_its_provenance_is_that_of_the_search_and_says_that_it_is_not_the_last(self, tmp_path):
        given, _, network = case(budget="bitops=w4a4")
        method = Differentiable(epochs=3, readout="keep-one")
        Progress(given, method, network, tmp_path).after_epoch(2)
        provenance = Policy.load(tmp_path / "policy.json").provenance
        assert provenance["images"] == [IMAGES, 2, 6, 6] and provenance["method"] == "differentiable"
        assert {name: provenance[name] for name in given.provenance(method)} == given.provenance(method)
        assert provenance["so_far"] == "after epoch 2 of 3, by readout probability and pick best"

    def test_no_folder_no_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        given, _, network = case(budget="bitops=w4a4")
        Progress(given, Differentiable(), network, None).after_epoch(1)
        assert not list(tmp_path.iterdir())


def test_candidates_are_told_as_the_command_line_takes_them_or_pair_by_pair():
    assert _offered((LayerBits(4, 8), LayerBits(2, 8))) == "w=2,4;a=8"
    assert _offered((LayerBits(8, 8), LayerBits(2, 4))) == "2/4 8/8"
