import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitscape.data.samples import Samples
from bitscape.engine import Batch, TrainResult
from bitscape.engine.pace import Pace
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.searches.asga import Asga
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.mixed_network import MixtureStep, mixed_network
from bitscape.searches.mixture_search import train_mixture
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import proxy_task
from bitscape.searches.seam import Seam
from tests.searches.planted import POLICY, Killed, kill_at, planted
from tests.searches.small import square
from tests.sharpness.small import batch, float_net, gradients

pytestmark = pytest.mark.slow

IMAGES = 24
SHORT = {"epochs": 2, "batch_size": 6}


def problem(labelled=True, **settings):
    inputs, labels = batch(IMAGES)
    usual = {"budget": ("bitops=w4a4", "weight_bytes=w5"), "candidates": square(2, 4, 8), "pinned": {}}
    samples = Samples.of(inputs, labels if labelled else None)
    return SearchProblem.of(**{"model": float_net(dropout=0.2), "samples": samples, **usual, **settings})


def trained(method, given, folder=None):
    return train_mixture(given, method, method.make_step, folder)


def comparable(trace):
    """Records of epochs without clock times, and without how much the policy changed, which a new start cannot know."""
    return [{name: value for name, value in record.items() if name not in ("train_s", "layers_changed")} for record in trace]


KILLED = [
    (Differentiable(**SHORT), False),
    (Differentiable(**SHORT, task="follow", readout="drop-one"), True),
    (Differentiable(**SHORT, task="new-head", head_epochs=1), True),
    (Seam(**SHORT), True),
    (Seam(**SHORT, held_out=0.3), True),
    (Asga(**SHORT), False),
    (Asga(**SHORT, held_out=0.3), True),
]
"""What is searched by, and whether it leaves checkpoints within the epoch too."""


class TestResume:
    @pytest.mark.parametrize(("method", "every_batch"), KILLED)
    def test_a_search_killed_on_the_way_ends_where_one_that_was_not_does(self, method, every_batch, tmp_path, monkeypatch):
        torch.manual_seed(1)
        whole = method.search(problem())
        if every_batch:
            monkeypatch.setattr(Pace, "save_due", lambda *_: True)
        with monkeypatch.context() as patched:
            kill_at(patched, 7)  # in the second epoch, of 4 steps, or of 2 that keep the budget twice
            with pytest.raises(Killed):
                method.search(problem(), folder=tmp_path)
        torch.manual_seed(2)
        resumed = method.search(problem(), folder=tmp_path)
        assert resumed.policy == whole.policy
        np.testing.assert_array_equal(resumed.scores.values, whole.scores.values)
        assert comparable(resumed.trace) == comparable(whole.trace)

    def test_the_policy_so_far_is_there_after_the_first_epoch(self, tmp_path, monkeypatch):
        given = problem()
        kill_at(monkeypatch, 3)  # an epoch has 4 steps
        with pytest.raises(Killed):
            Differentiable(**SHORT).search(given)
        assert not (tmp_path / "policy.json").exists()
        kill_at(monkeypatch, 5)
        with pytest.raises(Killed):
            Differentiable(**SHORT).search(problem(), folder=tmp_path)
        policy = Policy.load(tmp_path / "policy.json")
        assert given.choices.budget.exceeded(given.network, policy) == {}
        assert set(policy.layers.values()) <= set(given.choices.candidates)

    def test_the_policy_in_the_folder_is_at_last_the_one_found(self, tmp_path):
        method = Differentiable(**SHORT, readout="keep-one")
        found = method.search(problem(), folder=tmp_path).policy
        assert Policy.load(tmp_path / "policy.json") == found
        assert "so_far" not in found.provenance and found.provenance["settings"]["readout"] == "keep-one"
        assert method.search(problem(), folder=tmp_path).policy == found and Policy.load(tmp_path / "policy.json") == found

    def test_it_is_there_too_where_nothing_is_to_be_decided(self, tmp_path):
        pins = dict.fromkeys(("0", "4", "6"), LayerBits(4, 4))
        found = Differentiable(**SHORT).search(problem(pinned=pins), folder=tmp_path / "new").policy
        assert Policy.load(tmp_path / "new" / "policy.json") == found


def other_weights():
    model = float_net(dropout=0.2)
    model[0].weight.data[0] += 1
    return model


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a search, which those that are refused leave as it is."""
    folder = tmp_path_factory.mktemp("searched")
    trained(Differentiable(epochs=1, batch_size=6), problem(), folder)
    return folder


class TestFolderOfAnotherSearch:
    @pytest.mark.parametrize(
        ("method", "settings", "message"),
        [
            (Differentiable(**SHORT), {"budget": ("bitops=w2a4", "weight_bytes=w5")}, "budget.bitops was 30912 and is 15456;"),
            (Differentiable(**SHORT), {"candidates": square(2, 4)}, "candidates was 'w=2,4,8;a=2,4,8' and is 'w=2,4;a=2,4';"),
            (Differentiable(**SHORT), {"pinned": {"4": LayerBits(4, 2)}}, ".*pinned.4 was 'absent' and is '4/2';"),
            (Differentiable(**SHORT), {"tied": [("0", "4")]}, r"tied was \[\] and is \['0 4'\];"),
            (Differentiable(**SHORT), {"seed": 1}, "seed was 0 and is 1;"),
            (Differentiable(**SHORT), {"labelled": False}, r"targets was \[.*\] and is \[None\]"),
            (Differentiable(**SHORT), {"model": other_weights()}, "model.sample_sha256 was"),
            (Differentiable(**SHORT, lr=0.02), {}, "settings.lr was 0.01 and is 0.02;"),
            (Seam(**SHORT), {}, "method was 'differentiable' and is 'seam'; settings.margin_weight was 'absent' and is 1.0;"),
        ],
    )
    def test_it_is_told_by_what_was_asked(self, method, settings, message, searched):
        before = {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()}
        with pytest.raises(BitscapeError, match=rf"folder .* is of another search: {message}") as refused:
            replace(method, epochs=1).search(problem(**settings), folder=searched)
        assert str(refused.value).endswith("; give another folder, or delete this one")
        assert {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize("pinned", [(), ("0", "4", "6")])
    @pytest.mark.parametrize("name", ["policy.json", "model.safetensors", "checkpoint.safetensors"])
    def test_results_of_anything_else_are_left_as_they_are(self, name, pinned, tmp_path):
        (tmp_path / name).write_text("of a training")
        with pytest.raises(BitscapeError, match=rf"folder .* holds {name}, and not of a search; give another folder"):
            Differentiable(**SHORT).search(problem(pinned=dict.fromkeys(pinned, LayerBits(4, 4))), folder=tmp_path)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "of a training"}

    def test_one_that_has_no_checkpoint_yet_is_free(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patched:
            kill_at(patched, 0)
            with pytest.raises(Killed):
                Differentiable(**SHORT, task="follow").search(problem(), folder=tmp_path)
        method = Differentiable(**SHORT, task="follow", lr=0.02)
        assert method.search(problem(), folder=tmp_path).policy == method.search(problem()).policy
        with pytest.raises(BitscapeError, match=r"settings.lr was 0.02 and is 0.01"):
            Differentiable(**SHORT, task="follow").search(problem(), folder=tmp_path)

    def test_another_readout_needs_no_training(self, tmp_path, monkeypatch):
        Differentiable(**SHORT).search(problem(), folder=tmp_path)
        method = Differentiable(**SHORT, readout="keep-one")
        whole = method.search(problem())
        kill_at(monkeypatch, 0)
        assert method.search(problem(), folder=tmp_path).policy == whole.policy


@pytest.mark.parametrize(("epochs", "steps"), [(2, 8), (12, 48), (13, 52)])
def test_a_search_too_short_to_learn_says_so(epochs, steps, caplog, monkeypatch):
    monkeypatch.setattr("bitscape.searches.mixture_search.train", lambda *_, **__: TrainResult(records=(), ema=None))
    with caplog.at_level("WARNING", "bitscape.searches"):
        trained(Differentiable(epochs=epochs, batch_size=6), problem())
    said = [record.getMessage().partition("; raise images")[0] for record in caplog.records]
    warning = f"the mixture search makes {steps} steps in all, too few to learn bits from: 24 images / batch_size 6, epochs {epochs}"
    assert [text for text in said if "too few" in text] == [warning] * (steps < 50)


def test_one_step_moves_weights_by_their_batch_and_logits_by_the_held_out_one():
    method = Differentiable(epochs=1, batch_size=IMAGES, held_out=0.5, task="labels", logit_lr=0.25)
    given = problem()
    given.prepared[3].p = 0.0  # no dropout
    mixed = trained(method, given).mixed
    task = proxy_task(given, "labels", batch_size=IMAGES, head_epochs=1, folder=None)
    found = []
    for part in task.split(0.5):
        fresh = mixed_network(given, copy.deepcopy(task.model))
        before = {name: parameter.detach().clone() for name, parameter in fresh.model.named_parameters()}
        MixtureStep(mixed=fresh)(fresh.model.train(), Batch.of(*next(part.batches.epoch(0)), part.loss))
        found.append(gradients(fresh.model))
    on_weights, on_held_out = found
    for name, parameter in mixed.model.named_parameters():
        moved = before[name] - parameter.detach()
        # The first step with Nesterov's momentum of 0.9 is 1.9 times the gradient.
        expected = 1.9 * 0.25 * on_held_out[name] if name.endswith(".logits") else 1.9 * 0.01 * on_weights[name]
        if parameter.ndim > 1 and "quantizer" not in name:
            expected = expected + 1.9 * 0.01 * 1e-4 * before[name]
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


QUICK = {"epochs": 1, "batch_size": 16, "lr": 1e-4}


@pytest.mark.parametrize(
    ("method", "fine_first"),
    [
        (Differentiable(**QUICK), True),
        (Differentiable(**QUICK), False),
        (Differentiable(**QUICK, task="follow"), True),
        (Differentiable(**QUICK, held_out=0.5), False),
        (Differentiable(**QUICK, readout="drop-one"), True),
        (Differentiable(**QUICK, readout="keep-one"), False),
        (Seam(**QUICK), True),
        (Asga(**QUICK), False),
    ],
)
def test_the_layer_whose_input_holds_fine_information_gets_the_bits(method, fine_first):
    given = planted(fine_first)
    assert torch.equal(given.decisions(given.samples), given.labels)
    assert method.search(given).policy.layers == POLICY


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"head_epochs": 0}, "head_epochs = 0"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"logit_lr": float("inf")}, "logit_lr = inf"),
        ({"lr": 1e39}, r"lr = 1e\+39: it must be above 0 and at most 1e\+06"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"held_out": 1.0}, "held_out = 1.0"),
        ({"held_out": -0.1}, "held_out = -0.1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(BitscapeError, match=message):
        Differentiable(**settings)


def test_the_records_tell_what_the_soft_choice_costs():
    given = problem()
    trace = Differentiable(**SHORT).search(given).trace
    assert [record["epoch"] for record in trace] == [1, 2]
    assert all(record["expected_bitops"] <= 1 + 1e-3 and record["expected_weight_bytes"] <= 1 + 1e-3 for record in trace)
