import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitscape.data.epochs import AS_READ, Rows
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine.step import TaskLoss
from bitscape.engine.task import CLASSES
from bitscape.engine.user_task import User
from bitscape.errors import BitscapeError
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.kl import Kl
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import HEAD_RATE, FollowFloat, ProxyTask, new_head, proxy_task
from tests.searches.small import square
from tests.sharpness.small import batch, float_net

IMAGES = 48


def problem(labels=None, model=None, seed=0, images=IMAGES):
    return SearchProblem.of(
        model=model or float_net(), samples=Samples.of(batch(images)[0], labels), budget="bitops=w4a4", candidates=square(2, 8), seed=seed
    )


def task(given, name="auto", head_epochs=1, folder=None, batch_size=16):
    return proxy_task(given, name, batch_size=batch_size, head_epochs=head_epochs, folder=folder)


def correct(given, share, classes):
    """The network's own decisions, of which all but a share are moved to another of the classes."""
    labels = given.decisions(given.samples).clone()
    wrong = round((1 - share) * len(labels))
    labels[:wrong] = (labels[:wrong] + 1) % classes
    return labels


class TestAuto:
    def test_without_labels_the_float_network_is_followed(self):
        given = problem()
        stated = task(given)
        assert stated.name == "follow" and isinstance(stated.loss, FollowFloat)
        assert torch.equal(stated.data.targets, given.decisions(given.samples))

    @pytest.mark.parametrize(("right", "name"), [(1.0, "labels"), (0.8, "labels"), (0.3, "new-head")])
    def test_labels_that_the_network_predicts_are_its_own(self, right, name):
        assert task(problem(correct(problem(), right, 3))).name == name

    @pytest.mark.parametrize(("wrong", "name"), [(2, "labels"), (12, "new-head")])
    def test_so_with_two_classes_of_which_each_is_half_of_the_images(self, wrong, name):
        model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 2, bias=False))
        half = batch(IMAGES // 2)[0]
        images = torch.cat([half, -half])  # without biases the opposite image has the opposite logits
        settings = {"model": model, "budget": "bitops=w4a4", "candidates": square(2, 8), "pinned": {}}
        unlabelled = SearchProblem.of(samples=images, **settings)
        labels = unlabelled.decisions(unlabelled.samples).clone()
        assert labels.bincount().tolist() == [IMAGES // 2] * 2
        for first in (0, IMAGES // 2):
            labels[first : first + wrong] = 1 - labels[first : first + wrong]
        assert task(SearchProblem.of(samples=Samples.of(images, labels), **settings)).name == name

    def test_labels_of_other_classes_get_a_classifier_with_as_many_outputs(self):
        labels = torch.arange(IMAGES) % 7
        stated = task(problem(labels))
        assert stated.name == "new-head" and stated.model(batch(2)[0]).shape == (2, 7)
        assert torch.equal(stated.data.targets, labels)
        assert stated.loss == TaskLoss(CLASSES) and stated.task == CLASSES

    @pytest.mark.parametrize(("decided", "name"), [(1, "labels"), (0, "new-head")])
    def test_a_single_class_is_its_own_where_all_are_right(self, decided, name):
        model = float_net()
        with torch.no_grad():
            model[6].bias[decided] = 100.0
        assert task(problem(torch.full((IMAGES,), 1), model)).name == name


class Heads(nn.Module):
    """Two outputs of different size and scale."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.body, self.map, self.value = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1), nn.Linear(64, 1)

    def forward(self, x):
        features = self.body(x).relu()
        return {"map": self.map(features), "value": 100 * self.value(features.flatten(1))}


def answers(last):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 1), last)


def dense():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))


def of_task(model, targets, meaning="auto"):
    samples = Samples.of(batch(IMAGES)[0], targets)
    return SearchProblem.of(model=model, samples=samples, budget="bitops=w4a4", candidates=square(2, 8), pinned={}, task=meaning)


LABELS = torch.arange(IMAGES) % 2


class TestOtherTasks:
    @pytest.mark.parametrize(
        ("model", "targets", "meaning", "name", "read_as"),
        [
            (dense, torch.zeros(IMAGES, 4, 4, dtype=torch.int64), "dense", "labels", "dense"),
            (dense, None, "dense", "follow", "dense"),
            (lambda: answers(nn.Sigmoid()), LABELS, "auto", "labels", "binary"),
            (lambda: answers(nn.Sigmoid()), None, "auto", "follow", "binary"),
            (lambda: answers(nn.Identity()), LABELS, "binary", "labels", "binary"),
            (lambda: answers(nn.Identity()), torch.zeros(IMAGES, 1), "auto", "follow", "follow"),
            (Heads, None, "auto", "follow", "follow"),
            (Heads, [{"boxes": torch.ones(2, 4)}] * IMAGES, "auto", "follow", "follow"),
            (Heads, [{"boxes": torch.ones(2, 4)}] * IMAGES, User(lambda outputs, _: outputs["map"].mean()), "labels", "user"),
            (Heads, None, User(lambda outputs, _: outputs["map"].mean()), "follow", "user"),
            (float_net, torch.rand(IMAGES, 3), "auto", "follow", "classes"),  # values to regress look like logits
            (float_net, torch.arange(IMAGES, dtype=torch.int32) % 7, "auto", "new-head", "classes"),
        ],
    )
    def test_targets_are_learned_where_they_are_the_tasks(self, model, targets, meaning, name, read_as):
        given = of_task(model().eval(), targets, meaning)
        learned = task(given)
        assert (learned.name, learned.task.name) == (name, read_as)
        part = learned.parts(5)[0]
        assert part.loss(learned.task.read(part.outputs(learned.model.eval()), 5), part.targets).isfinite()

    def test_following_is_a_mean_over_the_values_of_all_outputs_in_their_own_units(self):
        given = of_task(Heads().eval(), None)
        images = given.samples.parts[0].inputs[:6]
        with torch.no_grad():
            expected, everything = given.prepared(images), given.prepared(batch(IMAGES)[0])
        outputs = {"map": torch.randn(6, 3, 4, 4), "value": torch.randn(6, 1)}
        spreads = {name: float(tensor.double().std(unbiased=False)) for name, tensor in everything.items()}
        squares = [((outputs[name] - expected[name]) / spreads[name]).square().sum() for name in outputs]
        loss = task(given).loss.for_batch(images)(outputs, None)
        torch.testing.assert_close(loss, sum(squares) / 2 / (6 * 49), rtol=1e-4, atol=0)

    def test_targets_to_follow_have_their_own_units(self):
        targets = 1000 * torch.randn(IMAGES, 1, generator=torch.Generator().manual_seed(0))
        learned = task(of_task(answers(nn.Identity()).eval(), targets), "labels")
        spread = float(targets.double().std(unbiased=False))
        assert learned.task.spreads == {"output0": pytest.approx(spread)}
        outputs = learned.task.read(torch.zeros(IMAGES, 1), IMAGES)
        aims, _ = learned.task.read_targets(targets, len(targets))
        assert float(learned.task.loss(outputs, aims)) == pytest.approx(float((targets / spread).square().mean() / 2))

    @pytest.mark.parametrize(
        ("model", "targets", "meaning", "name", "message"),
        [
            (dense, torch.full((IMAGES, 4, 4), 3), "dense", "auto", r"label 3.* outputs 0\.\.2.*task='follow', which needs no targets"),
            (lambda: answers(nn.Sigmoid()), 4 * LABELS, "auto", "auto", "from 0 to 4; task 'binary' needs 0 or 1; .*task='follow'"),
            (Heads, torch.zeros(IMAGES, 1), "auto", "labels", "the model returns map, value, and .*task='follow'"),
            (Heads, torch.zeros(IMAGES, 1), "auto", "new-head", "learns classes, .* outputs are of task 'follow'; use task='labels'"),
        ],
    )
    def test_targets_that_do_not_fit_are_refused(self, model, targets, meaning, name, message):
        with pytest.raises(BitscapeError, match=message):
            task(of_task(model().eval(), targets, meaning), name)


def boxes(count):
    """Samples from a loader, each with so many boxes as its number says."""
    images, targets = batch(count)[0], [torch.full((row, 4), row) for row in range(count)]
    return Samples(Minibatch(images[at : at + 4], targets[at : at + 4]) for at in range(0, count, 4))


class TestTargetsThatDoNotStack:
    def given(self, samples, meaning="auto"):
        return SearchProblem.of(Heads().eval(), samples, "bitops=w4a4", candidates=square(2, 8), pinned={}, task=meaning)

    def test_a_list_has_an_entry_for_each_sample(self):
        learned = task(self.given(boxes(10), User(lambda outputs, targets: outputs["map"].mean() * len(targets))), batch_size=3)
        (images, targets), *_ = learned.batches.epoch(0)
        for image, target in zip(images, targets, strict=True):
            assert torch.equal(image, batch(10)[0][len(target)])

    def test_they_are_not_needed_to_follow(self):
        learned = task(self.given(boxes(10)))
        assert learned.name == "follow" and torch.equal(learned.data.inputs, batch(10)[0]) and learned.data.targets is None

    def test_others_are_refused(self):
        parts = [Minibatch(part.inputs, {"boxes": torch.cat(part.targets)}) for part in boxes(10).parts]
        given = self.given(Samples(parts), User(lambda outputs, targets: outputs["map"].mean()))
        with pytest.raises(BitscapeError, match=r"its targets do not stack into one batch; .*task='follow'"):
            task(given)


class Named(nn.Module):
    """Logits in a mapping."""

    def __init__(self):
        super().__init__()
        self.net = float_net()

    def forward(self, x):
        return {"logits": self.net(x)}


class TestLogitsInAMapping:
    @pytest.mark.parametrize(("labels", "name"), [(None, "follow"), ("own", "labels"), (torch.arange(IMAGES) % 7, "new-head")])
    def test_they_are_learned_as_those_of_a_tensor(self, labels, name):
        labels = correct(problem(), 1.0, 3) if isinstance(labels, str) else labels
        learned, expected = task(of_task(Named().eval(), labels, "classes")), task(of_task(float_net().eval(), labels))
        assert learned.name == expected.name == name
        assert torch.equal(learned.data.targets, expected.data.targets)
        losses = [
            [part.loss(each.task.read(part.outputs(each.model.eval()), 16), part.targets) for part in each.parts(32)]
            for each in (learned, expected)
        ]
        assert losses[0] == losses[1]

    def test_the_least_sharp_policy_is_that_of_a_tensor(self):
        gaps = []
        for model in (Named(), float_net()):
            given = of_task(model.eval(), None, "classes")
            gaps.append([record["gap"] for record in Kl().search(given, pick="least-sharp").trace])
        assert gaps[0] == gaps[1] != []


def test_labels_below_0_are_told():
    with pytest.raises(BitscapeError, match="it has the label -1; labels count from 0"):
        task(of_task(float_net(), torch.arange(IMAGES) % 3 - 1))


def test_a_new_classifier_beside_another_head_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Sequential(nn.Flatten(), nn.Linear(72, 3)) for _ in range(2))

        def forward(self, x):
            return self.one(x) + self.two(x)

    message = r"layer two.1: the network does not work with a new classifier of 7 outputs in its place \(The size .*; use task='follow'"
    with pytest.raises(BitscapeError, match=message):
        task(of_task(Two().eval(), torch.arange(IMAGES) % 7), "new-head")


@pytest.mark.parametrize("name", ["labels", "new-head"])
def test_a_task_with_labels_needs_them(name):
    with pytest.raises(BitscapeError, match=f"task='{name}' learns labels, and the problem has none; .*'follow'"):
        task(problem(), name)


def test_labels_beyond_the_networks_outputs_are_refused():
    with pytest.raises(BitscapeError, match=r"label 6.* outputs 0\.\.2"):
        Differentiable(task="labels").search(problem(torch.arange(IMAGES) % 7))


def test_the_prepared_network_is_left_alone():
    given = problem(torch.arange(IMAGES) % 7)
    before = {name: value.clone() for name, value in given.prepared.state_dict().items()}
    assert task(given, "new-head").model is not given.prepared
    assert task(given, "follow").model is not given.prepared
    assert all(torch.equal(given.prepared.state_dict()[name], value) for name, value in before.items())
    assert not given.prepared.training


class TestNewHead:
    def test_it_learns_what_the_features_tell_and_nothing_else_moves(self):
        labels = 4 - batch(IMAGES)[1]  # other numbers for the classes that the images show: 2 to 4
        given = problem(labels)
        stated = task(given, "new-head", head_epochs=120)
        untrained = task(given, "new-head", head_epochs=1)
        losses = [cross_entropy(each.model.eval()(given.samples.parts[0].inputs), labels).item() for each in (stated, untrained)]
        assert losses[0] < 0.5 * math.log(3) and losses[0] < losses[1]
        assert (stated.model(given.samples.parts[0].inputs).argmax(1) == labels).float().mean() > 0.8
        for (name, new), (_, old) in zip(stated.model.named_parameters(), given.prepared.named_parameters(), strict=True):
            assert new.requires_grad and (name.startswith("6.") or torch.equal(new, old))

    def test_the_body_stays_as_it_is(self):
        model = float_net(dropout=0.5)
        given = problem(torch.arange(IMAGES) % 7, model)
        stated = task(given, "new-head", head_epochs=2)
        body = {name: value for name, value in given.prepared.state_dict().items() if not name.startswith("6.")}
        assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= body.keys()
        assert all(torch.equal(stated.model.state_dict()[name], value) for name, value in body.items())

    def test_it_learns_from_the_features_of_the_float_network(self):
        """One step of AdamW moves each weight by its rate against the sign of the gradient, here at the frozen network's own features."""
        labels = torch.arange(IMAGES) % 7
        given = problem(labels, float_net(dropout=0.5))
        torch.manual_seed(given.seed)
        head = new_head("6", given.prepared[6], 7)
        cross_entropy(head(given.prepared[:6](given.samples.parts[0].inputs)), labels).backward()
        expected = head.weight - HEAD_RATE * head.weight.grad.sign()
        stated = task(given, "new-head", batch_size=IMAGES)
        clear = head.weight.grad.abs() > 1e-5
        torch.testing.assert_close(stated.model[6].weight[clear], expected[clear], rtol=0, atol=1e-5)

    def test_no_gpu_is_touched_to_draw_it(self, monkeypatch):
        def touched(*_):
            raise AssertionError("a GPU's random state is read or set")

        given = problem(torch.arange(IMAGES) % 7)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name in ("get_rng_state", "set_rng_state", "manual_seed_all"):
            monkeypatch.setattr(torch.cuda, name, touched)
        monkeypatch.setattr("bitscape.searches.proxy_task.train", lambda *_, **__: None)
        assert task(given, "new-head").name == "new-head"

    def test_it_depends_on_the_seed_alone(self):
        heads = []
        for outside, seed in ((1, 5), (2, 5), (1, 6)):
            torch.manual_seed(outside)
            state = torch.get_rng_state()
            heads.append(task(problem(torch.arange(IMAGES) % 7, seed=seed), "new-head").model[6].weight)
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])

    def test_a_convolution_at_the_end_gets_another_one(self):
        model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        stated = task(problem(torch.arange(IMAGES) % 5, model), "new-head")
        assert stated.model[2].weight.shape == (5, 8, 1, 1) and stated.model(batch(2)[0]).shape == (2, 5)

    def test_it_is_like_the_old_one_but_for_its_outputs(self):
        old = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, bias=False, dtype=torch.float64)
        made = new_head("head", old, 9)
        assert made.bias is None and made.weight.dtype == torch.float64
        x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
        assert made(x).shape == (2, 9, *old(x).shape[2:])
        linear = new_head("head", nn.Linear(4, 6), 2)
        assert linear.weight.shape == (2, 4) and linear.bias.shape == (2,)

    @pytest.mark.parametrize("old", [nn.Conv2d(4, 4, 1, groups=2), nn.Conv1d(4, 4, 1)])
    def test_other_layers_cannot_be_replaced(self, old):
        with pytest.raises(BitscapeError, match=f"layer last: a {type(old).__name__} .*task='follow'"):
            new_head("last", old, 3)


def test_following_is_the_divergence_from_the_float_outputs():
    given = problem()
    images, logits = given.samples.parts[0].inputs[:6], torch.randn(6, 3)
    aim = given.prepared(images).softmax(1)
    expected = (aim * (aim.log() - logits.log_softmax(1))).sum(1).mean()
    loss = task(given).loss.for_batch(images)
    torch.testing.assert_close(loss(logits, given.decisions(given.samples)[:6]), expected)
    torch.testing.assert_close(loss(given.prepared(images), given.decisions(given.samples)[:6]), torch.tensor(0.0), atol=1e-6, rtol=0)


class TestSplit:
    def stated(self, images=20, seed=0):
        """Of images that hold their own number, which is their label too."""
        numbers = Minibatch(torch.arange(float(images)).reshape(-1, 1, 1, 1), torch.arange(images))
        rows = Rows(data=numbers, reader=AS_READ, batch_size=6, seed=seed)
        return ProxyTask(name="labels", model=nn.Identity(), batches=rows, task=CLASSES, loss=TaskLoss(CLASSES))

    def test_it_is_a_partition_drawn_by_the_seed(self):
        parts = [self.stated(seed=seed).split(0.3) for seed in (0, 0, 1)]
        held_out = [sorted(part[1].data.targets.tolist()) for part in parts]
        assert held_out[0] == held_out[1] != held_out[2] and len(held_out[0]) == 6
        kept = parts[0][0].data
        assert sorted([*kept.targets.tolist(), *held_out[0]]) == list(range(20))
        assert torch.equal(kept.inputs.flatten().long(), kept.targets)
        assert parts[0][1].batches.batch_size == 6

    def test_nothing_held_out_is_the_task_itself(self):
        stated = self.stated()
        assert stated.split(0.0) == (stated, None)

    @pytest.mark.parametrize(("images", "share"), [(1, 0.5), (20, 0.01), (20, 0.99)])
    def test_a_side_without_images_is_refused(self, images, share):
        with pytest.raises(BitscapeError, match=f"held_out = {share} of {images} images"):
            self.stated(images).split(share)
