import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitscape.data.epochs import AS_READ, Rows
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine import Sgd
from bitscape.engine.step import CrossEntropy, TaskLoss
from bitscape.engine.task import CLASSES
from bitscape.policy import LayerBits
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.mixture import Mixture
from bitscape.searches.mixed_network import Alternating, MixtureSgd, MixtureStep, mixed_network
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import ProxyTask
from tests.searches.small import square
from tests.sharpness.small import batch, float_net, gradients, same, whole


def problem(**settings):
    images, labels = batch(24)
    usual = {"model": float_net(), "budget": "bitops=w3a3", "candidates": square(2, 4, 8), "pinned": {}}
    return SearchProblem.of(samples=Samples.of(images, labels), **{**usual, **settings})


def mixed(**settings):
    given = problem(**settings)
    return mixed_network(given, copy.deepcopy(given.prepared))


def spread_logits(network):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for logits in network.logits():
            logits.copy_(torch.randn(len(logits), generator=generator))
    return network


class TestMixedNetwork:
    def test_each_group_has_a_mixture_of_its_weights_and_one_of_its_inputs(self):
        network = mixed(candidates=tuple(LayerBits(w, a) for w in (2, 4) for a in (3, 5, 8)), tied=[("0", "6")])
        layers = quantized_layers(network.model)
        assert network.head == "6" and list(layers) == ["0", "4", "6"]
        assert network.weights == [layers[name].weight_quantizer for name in ("0", "4")]
        assert network.inputs == [layers[name].input_quantizer for name in ("0", "4")]
        assert {m.widths for m in network.weights} == {(2, 4)} and {m.widths for m in network.inputs} == {(3, 5, 8)}
        assert layers["6"].weight_quantizer.logits is layers["0"].weight_quantizer.logits
        assert all(quantizer.initialized for layer in layers.values() for quantizer in (layer.weight_quantizer, layer.input_quantizer))

    def test_pinned_layers_and_those_never_called_have_plain_bits(self):
        class Net(nn.Sequential):
            def __init__(self):
                super().__init__(*float_net())
                self.idle = nn.Linear(2, 2)

            def forward(self, x):
                for layer in list(self)[:-1]:
                    x = layer(x)
                return x

        network = mixed(model=Net(), pinned={"4": LayerBits(2, 4)})
        layers = quantized_layers(network.model)
        assert static_bits(layers["4"]) == LayerBits(2, 4) and static_bits(layers["idle"]) == LayerBits(8, 8)
        assert len(network.weights) == len(network.inputs) == 2

    def test_the_budget_is_kept_by_the_price_that_all_layers_of_a_group_see(self):
        network = mixed(budget=("bitops=w3a3",), tied=[("0", "6")])
        with torch.no_grad():
            for logits in network.logits():
                logits[-1] += 2
        (before,) = network.expected_cost().values()
        network.keep_budget()
        (after,) = network.expected_cost().values()
        assert before > 1.2 and after == pytest.approx(1.0, abs=1e-5)
        layers = quantized_layers(network.model)
        assert layers["0"].weight_quantizer.price[2] > 0
        assert torch.equal(layers["0"].weight_quantizer.shares, layers["6"].weight_quantizer.shares)

    def test_the_expected_cost_is_that_of_the_soft_shares(self):
        network = spread_logits(mixed(budget=("bitops=w4a4", "weight_bytes=w4")))
        by_hand = network.cost.expected(
            torch.stack([m.logits.softmax(0) for m in network.weights]), torch.stack([m.logits.softmax(0) for m in network.inputs])
        )
        assert network.expected_cost() == by_hand and set(by_hand) == {"bitops", "weight_bytes"}


class TestMixtureSgd:
    def test_logits_have_their_own_rate_and_neither_they_nor_scales_decay(self):
        network = mixed(tied=[("0", "4")])
        settings = MixtureSgd(sgd=Sgd(lr=0.02, momentum=0.8, weight_decay=0.3), logit_lr=0.7)
        groups = {group["name"]: group for group in settings.build(network.model).param_groups}
        assert [id(p) for p in groups["logits"]["params"]] == [
            id(logits) for pair in zip(network.weights, network.inputs, strict=True) for logits in (pair[0].logits, pair[1].logits)
        ]
        assert (groups["logits"]["lr"], groups["logits"]["weight_decay"]) == (0.7, 0.0)
        assert {name: group["weight_decay"] for name, group in groups.items() if group["weight_decay"]} == {"weights": 0.3}
        assert {group["lr"] for name, group in groups.items() if name != "logits"} == {0.02}
        scales = {id(m.scale) for m in network.model.modules() if isinstance(m, Mixture)}
        assert scales <= {id(p) for p in groups["quantizers"]["params"]}
        every = [id(p) for group in groups.values() for p in group["params"]]
        assert sorted(every) == sorted(id(p) for p in network.model.parameters())  # each once
        assert {(group["momentum"], group["nesterov"]) for group in groups.values()} == {(0.8, True)}


def test_the_step_is_the_gradient_of_the_loss_at_the_budgets_price():
    network, (images, labels) = spread_logits(mixed()), batch(12)
    twin = copy.deepcopy(network)
    record = MixtureStep(mixed=network)(network.model.train(), whole(images, labels))
    twin.keep_budget()
    logits = twin.model.train()(images)
    value = cross_entropy(logits, labels)
    value.backward()
    assert any(mixture.price.any() for mixture in network.weights)
    assert torch.equal(record.loss, value) and int(record.sums[0]) == int((logits.argmax(1) == labels).sum())
    assert same(gradients(network.model), gradients(twin.model))
    assert all(logits.grad.any() for logits in network.logits())


def held_out_task(network, batch_size=5, images=15):
    x, y = batch(40)
    rows = Rows(data=Minibatch(x[-images:], y[-images:]), reader=AS_READ, batch_size=batch_size, seed=3)
    return ProxyTask(name="labels", model=network.model, batches=rows, task=CLASSES, loss=TaskLoss(CLASSES))


class TestAlternating:
    def test_weights_learn_from_the_batch_and_logits_from_held_out_images(self):
        network, (images, labels) = spread_logits(mixed()), batch(12)
        first, second, task = copy.deepcopy(network), copy.deepcopy(network), held_out_task(network)
        step = Alternating(step=MixtureStep(mixed=network), held_out=task, mixed=network)
        record = step(network.model.train(), whole(images, labels))

        expected = MixtureStep(mixed=first)(first.model.train(), whole(images, labels))
        others, theirs = next(task.batches.epoch(0))
        MixtureStep(mixed=second)(second.model.train(), whole(others, theirs))
        by_batch, by_held_out, found = (gradients(each.model) for each in (first, second, network))
        assert torch.equal(record.loss, expected.loss)
        assert found.keys() == by_batch.keys() == by_held_out.keys()
        for name, gradient in found.items():
            wanted, other = (by_held_out, by_batch) if name.endswith(".logits") else (by_batch, by_held_out)
            assert torch.equal(gradient, wanted[name]), name
            assert not torch.equal(wanted[name], other[name]) or not gradient.any()

    def test_held_out_batches_come_in_turn_and_go_on_after_a_restart(self):
        network, (images, labels) = mixed(), batch(12)
        task, seen = held_out_task(network), []

        def noted(model, batch):
            seen.append((batch.parts[0].inputs, batch.parts[0].targets))
            return MixtureStep(mixed=network)(model, batch)

        step = Alternating(step=noted, held_out=task, mixed=network)
        for _ in range(2):
            step(network.model, whole(images, labels))
        again = Alternating(step=noted, held_out=task, mixed=network)
        again.load_state_dict(step.state_dict())
        for _ in range(3):
            again(network.model, whole(images, labels))
        expected = [*task.batches.epoch(0), *list(task.batches.epoch(1))[:2]]
        assert len(seen) == 10
        for (x, y), (own_x, own_y) in zip(seen[1::2], expected, strict=True):
            assert torch.equal(x, own_x) and torch.equal(y, own_y)

    def test_the_state_of_the_inner_step_is_kept_too(self):
        class Counting:
            steps = 0

            def __call__(self, model, batch):
                self.steps += 1
                return MixtureStep(mixed=network)(model, batch)

            def state_dict(self):
                return {"steps": torch.tensor(self.steps), "batch": torch.tensor(-1)}

            def load_state_dict(self, state):
                assert state.keys() == {"steps", "batch"}
                self.steps = int(state["steps"])

        network, (images, labels) = mixed(), batch(12)
        step, again = (Alternating(step=Counting(), held_out=held_out_task(network), mixed=network) for _ in range(2))
        for _ in range(2):
            step(network.model, whole(images, labels))
        again.load_state_dict(step.state_dict())
        assert again.step.steps == 4 and again.batch == 2

    def test_held_out_images_have_the_tasks_own_loss(self):
        network, (images, labels) = mixed(), batch(12)
        seen = []

        class Noted(CrossEntropy):
            def for_batch(self, images):
                seen.append(images)
                return lambda logits, labels: 0.0 * logits.sum()

        task = held_out_task(network)
        task = replace(task, loss=Noted())
        Alternating(step=MixtureStep(mixed=network), held_out=task, mixed=network)(network.model, whole(images, labels))
        assert torch.equal(seen[0], next(task.batches.epoch(0))[0])
        assert not any(logits.grad.any() for logits in network.logits())
        assert network.model[0].weight.grad.any()
