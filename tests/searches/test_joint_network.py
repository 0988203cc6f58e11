import copy
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from bitscape.data.samples import Samples
from bitscape.policy import LayerBits
from bitscape.quant.layers import static_bits
from bitscape.searches.choices import InfeasibleBudget
from bitscape.searches.joint_network import JointStep, center, joint_network
from bitscape.searches.problem import SearchProblem
from tests.searches.small import square
from tests.sharpness.small import batch, float_net, gradients, whole


def problem(**settings):
    images, labels = batch(24)
    usual = {
        "model": float_net(),
        "budget": "bitops=w3a3",
        "candidates": square(2, 3, 4, 8),
        "pinned": {},
    }
    return SearchProblem.of(samples=Samples.of(images, labels), **{**usual, **settings})


def joint(**settings):
    given = problem(**settings)
    return joint_network(given, copy.deepcopy(given.prepared))


class TestCenter:
    @pytest.mark.parametrize(
        ("settings", "bits"),
        [
            ({}, LayerBits(3, 3)),
            ({"budget": "bitops=w4a4"}, LayerBits(4, 4)),
            ({"budget": "bitops=0.5x"}, LayerBits(4, 8)),  # of 4/8 and 8/4 the first
            ({"budget": "weight_bytes=w3"}, LayerBits(3, 8)),
        ],
    )
    def test_is_the_widest_uniform_pair_that_fits(self, settings, bits):
        assert set(center(problem(**settings).choices)) == {bits}

    def test_is_within_the_budget_where_no_uniform_pair_is(self):
        choices = problem(
            candidates=(LayerBits(2, 8), LayerBits(8, 2)),
            budget=("mean_weight_bits=5", "mean_activation_bits=5"),
        ).choices
        pairs = center(choices)
        assert len(set(pairs)) == 2
        assert choices.holds(tuple(choices.candidates.index(bits) for bits in pairs))

    def test_refuses_a_budget_that_nothing_fits(self):
        with pytest.raises(InfeasibleBudget, match="bitops"):
            center(problem(budget="bitops=w1a1").choices)


class TestJointNetwork:
    def test_every_layer_of_a_group_takes_its_pair_and_pinned_ones_keep_theirs(self):
        network = joint(pinned={"4": LayerBits(5, 6)}, tied=[("0", "6")])
        network.use([LayerBits(2, 8)])
        assert [static_bits(network.model[at]) for at in (0, 4, 6)] == [
            LayerBits(2, 8),
            LayerBits(5, 6),
            LayerBits(2, 8),
        ]
        assert network.widest == (LayerBits(8, 8),)

    def test_a_pair_is_drawn_half_as_often_for_each_bit_away(self):
        network, generator = (
            joint(candidates=(LayerBits(2, 3), LayerBits(3, 3), LayerBits(4, 4))),
            torch.Generator().manual_seed(0),
        )
        assert network.center == (LayerBits(3, 3),) * 3
        drawn = Counter(pair for _ in range(1000) for pair in network.draw(generator))
        # 1 : 1/2 : 1/4 of 3,000; three standard deviations are below 90
        assert drawn[LayerBits(3, 3)] == pytest.approx(3000 * 4 / 7, abs=90)
        assert drawn[LayerBits(2, 3)] == pytest.approx(3000 * 2 / 7, abs=90)
        assert drawn[LayerBits(4, 4)] == pytest.approx(3000 * 1 / 7, abs=90)

    def test_a_layer_of_fixed_activations_is_offered_no_others(self):
        network = joint(budget="weight_bytes=w3")
        assert {bits.activation for pairs in network.allowed for bits in pairs} == {8}


class TestStep:
    def test_the_gradient_is_the_mean_of_three_policies_and_the_record_is_of_the_center(self):
        network, (images, labels) = joint(), batch(12)
        model = network.model.eval()  # norms do not see one another's batches
        drawn = joint().draw
        step = JointStep(network=network, seed=3)
        seen = []
        network.draw = lambda generator: seen.append(drawn(generator)) or seen[-1]
        record = step(model, whole(images, labels))
        found = gradients(model)
        expected = {}
        for pairs in (network.widest, seen[0], network.center):
            network.use(pairs)
            model.zero_grad(set_to_none=True)
            loss = cross_entropy(model(images), labels)
            loss.backward()
            for name, gradient in gradients(model).items():
                expected[name] = expected.get(name, 0) + gradient / 3
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)
        assert record.loss == loss and step.steps == 1

    def test_what_is_drawn_goes_on_from_the_state(self):
        drawn = []
        for first in (0, 2):
            network = joint()
            step, draw = JointStep(network=network, seed=3), network.draw
            network.draw = lambda generator, draw=draw: drawn.append(draw(generator)) or drawn[-1]
            step.load_state_dict({"steps": torch.tensor(first)})
            for _ in range(first, 3):
                step(network.model, whole(*batch(6)))
            assert step.state_dict() == {"steps": torch.tensor(3)}
        assert drawn[2] == drawn[3] and len(set(drawn)) > 1
