import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from bitscape.data.samples import Samples
from bitscape.engine import Batch
from bitscape.errors import BitscapeError
from bitscape.models.digits import digits_net
from bitscape.models.layers import quantizable_layers
from bitscape.searches.mixed_network import MixtureStep, mixed_network
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import proxy_task
from bitscape.searches.seam import (
    Seam,
    SeamStep,
    class_centers,
    feature_layers,
    features_of,
    fisher_ratio,
    hinge,
    margins,
    network_margins,
)
from tests.searches.small import square
from tests.sharpness.small import batch, float_net, gradients, same, whole

NAN, INF, ROOT2 = float("nan"), float("inf"), math.sqrt(2)
CENTERS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [NAN, NAN], [-1.0, 0.0]])
"""Classes 0, 1 and 3; class 2 has not been seen."""


class TestMargins:
    @pytest.mark.parametrize(
        ("feature", "label", "margin"),
        [
            ([1.0, 0.0], 0, ROOT2),  # at its center; (0, 1) is the nearest rival
            ([0.0, 1.0], 1, ROOT2),
            ([0.0, 1.0], 0, -ROOT2),  # at a rival's
            ([-1.0, 0.0], 0, -2.0),  # nearest rival at 0, own center at the far end
            ([0.6, 0.8], 0, math.sqrt(0.36 + 0.04) - math.sqrt(0.16 + 0.64)),
            ([0.6, 0.8], 3, math.sqrt(0.4) - math.sqrt(2.56 + 0.64)),
            ([0.6, 0.8], 2, INF),  # no center of its own yet
        ],
    )
    def test_by_hand(self, feature, label, margin):
        assert margins(torch.tensor([feature]), torch.tensor([label]), CENTERS).tolist() == [pytest.approx(margin, abs=1e-6)]

    def test_without_rival_it_is_infinite_and_has_no_gradient(self):
        alone = torch.tensor([[NAN, NAN], [0.0, 1.0]])
        features = normalize(torch.randn(5, 2)).requires_grad_()
        found = hinge(features, torch.tensor([1, 1, 0, 1, 0]), alone, 0.5)
        found.backward()
        assert found == 0 and not features.grad.any()

    def test_the_gradient_at_a_center_is_finite(self):
        features = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        margins(features, torch.tensor([0, 1]), CENTERS).sum().backward()
        assert features.grad.isfinite().all()

    def test_the_hinge_is_the_mean_of_what_lacks(self):
        features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [0.0, 1.0]])
        labels = torch.tensor([0, 0, 0, 2])
        lacking = [0.0, 0.5 - (math.sqrt(0.4) - math.sqrt(0.8)), 0.5 + 2.0, 0.0]
        assert hinge(features, labels, CENTERS, 0.5).item() == pytest.approx(sum(lacking) / 4, rel=1e-6)


class TestFisherRatio:
    def test_by_hand(self):
        features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        # Squared distances to (1, 0): 0, 2, 0.8. Both centers are 1/2 (squared) from their mean.
        assert fisher_ratio(features, torch.tensor([0, 0, 0]), CENTERS[:2]).item() == pytest.approx((2.8 / 3) / 0.5)

    def test_classes_without_center_count_neither_within_nor_between(self):
        features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        centers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [NAN, NAN]])
        assert fisher_ratio(features, torch.tensor([0, 0, 2]), centers).item() == pytest.approx(1.0 / 0.5)

    def test_one_center_alone_gives_nothing(self):
        features = torch.randn(3, 2, requires_grad=True)
        found = fisher_ratio(features, torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0.0], [NAN, NAN]]))
        found.backward()
        assert found == 0 and not features.grad.any()


def test_class_centers_are_normalized_means():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    centers = class_centers(features, torch.tensor([2, 2, 0]), 3)
    torch.testing.assert_close(centers[0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(centers[2], torch.tensor([1.6, 0.8]) / math.sqrt(1.6**2 + 0.8**2))
    assert centers[1].isnan().all()


class TestFeatures:
    def test_maps_and_tokens_are_pooled_and_all_have_length_1(self):
        layers = [nn.Conv2d(3, 2, 1), nn.Linear(3, 2), nn.Linear(3, 2)]
        inputs = torch.randn(4, 3, 5, 5), torch.randn(4, 7, 3), torch.randn(4, 3)
        with features_of(layers) as seen:
            layers[0](inputs[0])
            layers[1](input=inputs[1])  # by keyword
            layers[2](inputs[2])
        means = inputs[0].mean((2, 3)), inputs[1].mean(1), inputs[2]
        torch.testing.assert_close(seen, [mean / mean.norm(dim=1, keepdim=True) for mean in means])

    def test_the_channels_are_those_of_the_layer(self):
        """Of a convolution they are the second dimension, of a linear layer the last."""
        layers = [nn.Conv1d(3, 2, 1), nn.Conv3d(3, 2, 1), nn.Linear(3, 2)]
        inputs = torch.randn(4, 3, 5), torch.randn(4, 3, 2, 5, 5), torch.randn(4, 5, 6, 3)
        with features_of(layers) as seen:
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
        means = inputs[0].mean(2), inputs[1].mean((2, 3, 4)), inputs[2].mean((1, 2))
        torch.testing.assert_close(seen, [mean / mean.norm(dim=1, keepdim=True) for mean in means])

    def test_the_hooks_are_gone_afterwards(self):
        layer = nn.Linear(3, 2)
        with pytest.raises(KeyError), features_of([layer]) as seen:
            layer(torch.randn(1, 3))
            raise KeyError
        layer(torch.randn(1, 3))
        assert len(seen) == 1 and not layer._forward_pre_hooks

    def test_stages_end_before_strided_layers_but_the_first(self):
        model = digits_net()
        model.stem[0].stride = (2, 2)
        layers = quantizable_layers(model)
        assert feature_layers(model, "head", "last") == [layers["head"]]
        assert feature_layers(model, "head", "stages") == [layers[name] for name in ("down.0", "widen.0", "head")]


class TestNetworkMargins:
    def test_classes_apart_have_the_margin_of_their_centers(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3, 5))
        labels = torch.tensor([0, 2, 4, 0, 2, 4, 4])
        images = torch.eye(3)[labels // 2].reshape(7, 3, 1, 1) * torch.arange(1, 8).reshape(7, 1, 1, 1)
        found = network_margins(model.train(), "1", images, labels)
        torch.testing.assert_close(found, torch.full((7,), ROOT2))
        assert model.training

    def test_over_batches_it_is_as_over_all_images_at_once(self):
        images, labels = batch(300)
        model = float_net().eval()
        features = normalize(model[:6](images).detach())
        expected = margins(features, labels, class_centers(features, labels, 3))
        torch.testing.assert_close(network_margins(model, "6", images, labels), expected, rtol=1e-4, atol=1e-5)


def problem(labels=None, **settings):
    images, usual_labels = batch(24)
    samples = Samples.of(images, usual_labels if labels is None else labels)
    usual = {"model": float_net(), "samples": samples, "budget": "bitops=w4a4", "candidates": square(2, 4, 8), "pinned": {}}
    return SearchProblem.of(**{**usual, **settings})


def next_batch(task):
    return Batch.of(*next(task.batches.epoch(0)), task.loss, task=task.task)


def ready(method=None, **settings):
    """A step of the method, and its network."""
    given = problem(**settings)
    task = proxy_task(given, "labels", batch_size=12, head_epochs=1, folder=None)
    network = mixed_network(given, task.model)
    return (method or Seam()).make_step(network, task), network


def features_by_hand(model, images):
    inputs = []
    handle = model[6].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits = model(images)
    handle.remove()
    return normalize(inputs[0]), logits


class TestSeamStep:
    def test_without_weight_it_is_the_mixtures_step(self):
        step, network = ready()
        plain, (images, labels) = copy.deepcopy(network), batch(12)
        step.weight = 0.0
        record = step(network.model.train(), whole(images, labels))
        expected = MixtureStep(mixed=plain)(plain.model.train(), whole(images, labels))
        assert torch.equal(record.loss, expected.loss) and torch.equal(record.sums, expected.sums)
        assert same(gradients(network.model), gradients(plain.model))
        assert record.extras["margin_term"] > 0

    @pytest.mark.parametrize("term", ["hinge", "fisher-ratio"])
    def test_its_gradient_is_that_of_the_loss_and_the_weighted_term(self, term):
        step, network = ready(Seam(term=term, margin_weight=0.7, margin=0.9))
        twin, (images, labels) = copy.deepcopy(network), batch(12)
        record = step(network.model.train(), whole(images, labels))
        twin.keep_budget()
        features, logits = features_by_hand(twin.model.train(), images)
        centers = class_centers(features.detach(), labels, 3)
        extra = hinge(features, labels, centers, 0.9) if term == "hinge" else fisher_ratio(features, labels, centers)
        (cross_entropy(logits, labels) + 0.7 * extra).backward()
        torch.testing.assert_close(record.extras["margin_term"], extra.detach())
        torch.testing.assert_close(record.extras["margin"], margins(features.detach(), labels, centers).mean())
        found, expected = gradients(network.model), gradients(twin.model)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)

    def test_centers_are_a_moving_mean_by_hand(self):
        step, _ = ready()
        first = step._moved(0, torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1])).clone()
        a = torch.tensor([1.6, 0.8]) / math.hypot(1.6, 0.8)
        torch.testing.assert_close(first[:2], torch.stack([a, torch.tensor([0.0, 1.0])]))
        assert first[2].isnan().all()
        second = step._moved(0, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 2]))
        b = 0.9 * a + 0.1 * torch.tensor([0.0, 1.0])
        torch.testing.assert_close(second, torch.stack([b / b.norm(), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0])]))

    def test_the_centers_go_round_as_a_state(self):
        method = Seam(features="stages")
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
        step, network = ready(method, model=model)
        images, labels = batch(12)
        step(network.model, whole(images[labels < 2], labels[labels < 2]))
        other, _ = ready(method, model=model)
        other.load_state_dict(step.state_dict())
        assert other.centers.keys() == step.centers.keys() == {0, 1}
        assert [centers.shape for centers in step.centers.values()] == [(3, 4), (3, 20)]
        for at, centers in step.centers.items():
            assert torch.equal(centers.nan_to_num(7.0), other.centers[at].nan_to_num(7.0)) and centers[2].isnan().all()

    def test_stages_count_alike(self):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
        (both, network), (last, _) = (ready(Seam(features=which), model=model) for which in ("stages", "last"))
        images, labels = batch(12)
        of_both = both(network.model, whole(images, labels)).extras["margin_term"]
        of_last = last(last.mixed.model, whole(images, labels)).extras["margin_term"]
        with features_of([network.model[2]]) as seen:
            network.model(images)
        of_stage = hinge(seen[0], labels, class_centers(seen[0], labels, 3), 0.5).detach()
        torch.testing.assert_close(of_both, (of_stage + of_last) / 2)

    def test_float_centers_are_those_of_the_float_network_and_stay(self):
        step, network = ready(Seam(centers="float"))
        given = problem()
        features = normalize(given.prepared[:6](given.samples.parts[0].inputs)).detach()
        torch.testing.assert_close(step.fixed[0], class_centers(features, given.labels, 3))
        before, (images, labels) = step.fixed[0].clone(), batch(12)
        step(network.model.train(), whole(images, labels))
        assert torch.equal(step.fixed[0], before) and step.state_dict() == {}

    def test_a_classifier_that_runs_twice_has_centers_of_both_its_inputs(self):
        class Difference(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = float_net()

            def forward(self, left, right):
                return self.net(left) - self.net(right)

        images, labels = batch(24)
        given = problem(model=Difference().eval(), samples=Samples.of((images, images.flip(0)), labels))
        task = proxy_task(given, "labels", batch_size=12, head_epochs=1, folder=None)
        network = mixed_network(given, task.model)
        step = Seam(centers="float").make_step(network, task)
        for centers, inputs in zip(step.fixed, (images, images.flip(0)), strict=True):
            features = normalize(given.prepared.net[:6](inputs).detach())
            torch.testing.assert_close(centers, class_centers(features, labels, 3))
        record = step(network.model.train(), next_batch(task))
        assert record.loss.isfinite() and record.extras["margin_term"] > 0

    def test_a_layer_with_rows_of_its_own_is_refused(self):
        step, network = ready()
        images, labels = batch(12)
        with pytest.raises(BitscapeError, match="a layer is called with 12 rows for 6 samples; use method differentiable or asga"):
            step(network.model.train(), whole(images, labels[:6]))

    def test_probabilities_count_as_their_likeliest_label(self):
        (soft, network), (hard, other) = ready(), ready()
        images, labels = batch(12)
        shares = 0.1 + 0.7 * torch.nn.functional.one_hot(labels, 3)
        term = soft(network.model.train(), whole(images, shares)).extras["margin_term"]
        assert torch.equal(term, hard(other.model.train(), whole(images, labels)).extras["margin_term"])

    def test_an_image_of_an_unseen_class_gets_no_term_but_a_loss(self):
        step, network = ready(Seam(centers="float"))
        step.fixed = [torch.full_like(step.fixed[0], NAN)]
        images, labels = batch(12)
        record = step(network.model.train(), whole(images, labels))
        assert record.extras["margin_term"] == 0 and record.extras["margin"] == 0
        assert all(gradient.isfinite().all() for gradient in gradients(network.model).values())


@pytest.mark.parametrize("centers", ["moving", "float"])
def test_a_class_whose_only_image_is_held_out_is_a_class_all_the_same(centers):
    images, labels = batch(24)
    _, held_out = proxy_task(problem(), "labels", batch_size=8, head_epochs=1, folder=None).split(0.25)
    only = next(at for at in range(24) if any(torch.equal(images[at], image) for image in held_out.data.inputs))
    labels = labels.clamp(max=1)
    labels[only] = 2
    method = Seam(epochs=1, batch_size=8, held_out=0.25, task="labels", centers=centers)
    given = problem(labels=labels)
    assert given.choices.budget.exceeded(given.network, method.search(given).policy) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"margin_weight": 0.0}, "margin_weight = 0.0"), ({"margin": 0.0}, "margin = 0.0"), ({"margin": 2.5}, "margin = 2.5")],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(BitscapeError, match=message):
        Seam(**settings)


def test_the_settings_reach_the_step():
    step, network = ready(Seam(margin_weight=0.3, margin=0.4, term="fisher-ratio"))
    assert isinstance(step, SeamStep)
    assert (step.weight, step.margin, step.term, step.classes, step.fixed) == (0.3, 0.4, "fisher-ratio", 3, None)
    assert step.layers == [network.model[6]]
