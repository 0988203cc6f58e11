import copy
import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import recalibrate_norms
from bitscape.searches.joint_network import JointNetwork, joint_network
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import proxy_task
from bitscape.searches.trained_scores import TrainedScores, _table, fitted, loss_rises, step_sizes
from tests.searches.planted import POLICY, Killed, planted
from tests.searches.small import square
from tests.sharpness.small import batch, float_net

pytestmark = pytest.mark.slow

IMAGES = 24
SHORT = {"epochs": 2, "batch_size": 6}


def problem(**settings):
    inputs, labels = batch(IMAGES)
    usual = {"budget": "bitops=w4a4", "candidates": square(2, 4, 8), "pinned": {}}
    return SearchProblem.of(
        **{"model": float_net(), "samples": Samples.of(inputs, labels), **usual, **settings}
    )


def joint(given):
    whole = proxy_task(given, "labels", batch_size=6, head_epochs=1, folder=None)
    learned, held_out = whole.split(0.25)
    return joint_network(given, learned.model), learned, held_out


@pytest.mark.parametrize("fine_first", [True, False])
def test_the_layer_whose_input_holds_fine_information_gets_the_bits(fine_first):
    assert (
        TrainedScores(epochs=1, batch_size=16, lr=1e-4).search(planted(fine_first)).policy.layers
        == POLICY
    )


class TestLossRises:
    def test_are_of_one_layer_alone_on_held_out_images_with_norms_of_the_others(self):
        network, learned, held_out = joint(problem())
        rises = loss_rises(network, learned, held_out, neighbors=False)
        assert [(sorted(w), sorted(a)) for w, a in rises] == [([2, 4, 8], [2, 4, 8])] * 3

        def loss(*pairs):
            model = copy.deepcopy(network.model)
            for layer, (weight, activation) in zip(
                (model[0], model[4], model[6]), pairs, strict=True
            ):
                layer.weight_quantizer.bits, layer.input_quantizer.bits = weight, activation
            recalibrate_norms(model, learned.data.inputs)
            with torch.no_grad():
                return float(
                    cross_entropy(model.eval()(held_out.data.inputs), held_out.data.targets)
                )

        at_center = loss((4, 4), (4, 4), (4, 4))
        assert rises[1][0][2] == pytest.approx(loss((4, 4), (2, 4), (4, 4)) - at_center, abs=1e-6)
        assert rises[2][1][8] == pytest.approx(loss((4, 4), (4, 4), (4, 8)) - at_center, abs=1e-6)
        assert all(side[4] == 0 for sides in rises for side in sides)

    def test_a_group_moves_as_one(self):
        network, learned, held_out = joint(problem(tied=[("0", "6")]))
        tied = loss_rises(network, learned, held_out, neighbors=False)
        assert len(tied) == 2
        network.use([LayerBits(2, 4), LayerBits(4, 4)])
        assert network.model[0].weight_quantizer.bits == network.model[6].weight_quantizer.bits == 2


class TestFitted:
    def test_neighbors_alone_are_measured(self):
        network, learned, held_out = joint(problem(candidates=square(2, 3, 4, 5, 8)))
        every = loss_rises(network, learned, held_out, neighbors=False)
        near = loss_rises(network, learned, held_out, neighbors=True)
        for all_sides, sides in zip(every, near, strict=True):
            for all_of, side in zip(all_sides, sides, strict=True):
                assert side == {bits: pytest.approx(all_of[bits], abs=1e-6) for bits in (3, 4, 5)}

    def test_scores_follow_the_law_of_the_best_sensitivity(self):
        network, _, _ = joint(problem())
        exact = {bits: 3 * (4.0**-bits - 4.0**-4) for bits in (2, 4, 8)}
        rising = {2: -1.0, 4: 0.0, 8: 1.0}
        off = {2: exact[2] + 0.1, 4: 0.0, 8: exact[8]}
        scores = fitted(network, [(exact, rising), (exact, off), (exact, exact)])
        assert scores[0][0] == {bits: pytest.approx(3 * 4.0**-bits) for bits in (2, 4, 8)}
        assert scores[0][1] == {2: 0.0, 4: 0.0, 8: 0.0}
        power = 4.0**-2 - 4.0**-4, 4.0**-8 - 4.0**-4
        more = 0.1 * power[0] / (power[0] ** 2 + power[1] ** 2)
        assert scores[1][1][4] == pytest.approx((3 + more) * 4.0**-4)


def test_step_sizes_are_the_learned_scales_and_of_weights_their_mean():
    network, _, _ = joint(problem(tied=[("0", "6")]))
    of_weight, of_input = step_sizes(network)[0]
    first, last = network.model[0], network.model[6]
    expected = sum(
        float(layer.weight_quantizer.at(4).scale.detach().mean()) for layer in (first, last)
    )
    assert of_weight[4] == pytest.approx(expected)
    assert of_input[8] == pytest.approx(
        float(
            first.input_quantizer.at(8).scale.detach() + last.input_quantizer.at(8).scale.detach()
        )
    )


class TestTable:
    def test_a_pair_scores_the_sum_of_its_widths_and_a_group_shares_it(self):
        given = problem(tied=[("0", "6")])
        scored = [
            ({2: 5.0, 4: 1.0, 8: 0.0}, {2: 0.5, 4: 0.25, 8: 0.0}),
            ({2: 3.0, 4: 1.0, 8: 0.0}, {2: 0.0, 4: 1.0, 8: 0.0}),
        ]
        table = _table(given, "m", [given.choices.candidates] * 2, scored)
        columns = list(map(str, table.candidates))
        rows = zip(table.layers, table.values, strict=True)
        value = {(layer, columns[at]): score for layer, row in rows for at, score in enumerate(row)}
        assert value["0", "2/4"] == value["6", "2/4"] == pytest.approx(5.25 / 2)
        # The inputs of the other group are not monotone: 1, 1, 0 from above and 0, 0, 0 from below.
        assert value["4", "4/2"] == pytest.approx(1.0 + 0.5, abs=1e-6)
        assert value["4", "4/8"] == pytest.approx(1.0, abs=1e-6)
        assert table.repairs == 2

    def test_pairs_that_the_budget_does_not_vary_are_forbidden(self):
        given = problem(budget="weight_bytes=w4")
        network, _, _ = joint(given)
        table = _table(given, "m", network.allowed, step_sizes(network))
        finite = {
            bits.activation
            for bits, value in zip(table.candidates, table.values[0], strict=True)
            if value < np.inf
        }
        assert finite == {8}


class TestResume:
    def test_a_search_killed_on_the_way_ends_where_one_that_was_not_does(
        self, tmp_path, monkeypatch
    ):
        whole = TrainedScores(**SHORT).search(problem())
        draw, calls = JointNetwork.draw, itertools.count()

        def killed(self, generator):
            if next(calls) == 4:  # in the second epoch, of 3 steps
                raise Killed
            return draw(self, generator)

        with monkeypatch.context() as patched:
            patched.setattr(JointNetwork, "draw", killed)
            with pytest.raises(Killed):
                TrainedScores(**SHORT).search(problem(), folder=tmp_path)
        resumed = TrainedScores(**SHORT).search(problem(), folder=tmp_path)
        np.testing.assert_array_equal(resumed.scores.values, whole.scores.values)
        assert resumed.policy == whole.policy == Policy.load(tmp_path / "policy.json")

    def test_another_readout_needs_no_training(self, tmp_path, monkeypatch):
        TrainedScores(**SHORT).search(problem(), folder=tmp_path)
        monkeypatch.setattr(JointNetwork, "draw", None)
        found = TrainedScores(**SHORT, readout="step-size").search(problem(), folder=tmp_path)
        assert found.scores.method == "trained-scores"
        with pytest.raises(
            BitscapeError, match=r"of another search: settings\.lr was 0.01 and is 0.02"
        ):
            TrainedScores(**SHORT, lr=0.02).search(problem(), folder=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"held_out": 0.0}, "held_out = 0.0: a share of the proxy above 0 and below 1"),
        ({"readout": "step"}, "readout = 'step': allowed are 'fitted', 'loss', 'step-size'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(BitscapeError, match=message):
        TrainedScores(**settings)
