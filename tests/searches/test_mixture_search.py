import pytest
import torch

from bitscape.data.samples import Samples
from bitscape.engine import TrainResult
from bitscape.engine.pace import Pace
from bitscape.engine.user_task import User
from bitscape.errors import BitscapeError
from bitscape.searches.asga import Asga
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.mixture_search import MixtureSettings, mixture_search, train_mixture
from bitscape.searches.seam import Seam
from tests.searches.planted import POLICY, Killed, Regression, TwoInputs, halves, kill_at, planted, planted_problem

pytestmark = pytest.mark.slow

QUICK = {"epochs": 1, "batch_size": 16, "lr": 1e-4}


def two_inputs(named=False, labelled=True):
    value, sign, labels = halves()
    inputs = {"sign": sign, "value": value} if named else (value, sign)
    return planted_problem(TwoInputs(fine_first=True), Samples.of(inputs, labels if labelled else None))


def squared_error(outputs, targets):
    return (outputs["level"] - targets["level"]).square()


def regression(loss=squared_error):
    value, sign, _ = halves()
    samples = Samples.of((value, sign), {"level": 10 * value[:, 0]})
    return planted_problem(Regression(), samples, task=User(loss))


@pytest.mark.parametrize("method", [Differentiable(**QUICK), Seam(**QUICK), Seam(**QUICK, centers="float"), Asga(**QUICK)])
class TestTwoInputs:
    @pytest.mark.parametrize("named", [False, True])
    def test_the_input_that_holds_fine_information_gets_the_bits(self, method, named):
        assert method.search(two_inputs(named)).policy.layers == POLICY

    def test_so_without_labels(self, method):
        result = method.search(two_inputs(labelled=False))
        assert result.policy.layers == POLICY
        assert result.trace[-1]["top1"] > 90  # decisions of the float network


class TestOwnLoss:
    @pytest.mark.parametrize(
        "method",
        [
            Differentiable(**QUICK),
            Differentiable(**QUICK, held_out=0.5),
            Differentiable(**QUICK, readout="drop-one"),
            Differentiable(**QUICK, readout="keep-one"),
            Differentiable(**QUICK, task="follow"),
            Asga(**QUICK),
        ],
    )
    def test_the_value_that_is_regressed_gets_the_bits(self, method):
        assert method.search(regression()).policy.layers == POLICY

    def test_it_is_the_users_loss_that_is_lowered(self):
        def negated(outputs, targets):
            return (outputs["level"] + targets["level"]).square()

        still = Differentiable(epochs=1, batch_size=64, lr=1e-9, logit_lr=1e-9)
        of_own, of_negated = (still.search(regression(loss)).trace[0]["loss"] for loss in (squared_error, negated))
        value = halves()[0]
        assert of_own < 1
        assert of_negated == pytest.approx(float((20 * value).square().mean()), rel=0.2)

    def test_seam_names_methods_that_can(self):
        message = "method seam needs logits of classes.* the task is 'user'; use method differentiable or asga"
        with pytest.raises(BitscapeError, match=message):
            Seam(**QUICK).search(regression())


@pytest.mark.parametrize("problem", [two_inputs, regression])
@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_a_search_killed_on_the_way_ends_where_one_that_was_not_does(problem, held_out, tmp_path, monkeypatch):
    method = Differentiable(epochs=2, batch_size=48, lr=1e-4, held_out=held_out)
    whole = method.search(problem())
    monkeypatch.setattr(Pace, "save_due", lambda *_: True)
    with monkeypatch.context() as patched:
        kill_at(patched, 4)  # in the second epoch, or of 2 passes a step in the first
        with pytest.raises(Killed):
            method.search(problem(), folder=tmp_path)
    resumed = method.search(problem(), folder=tmp_path)
    assert resumed.policy == whole.policy
    assert resumed.scores.values.tolist() == whole.scores.values.tolist()


class TestFolderOfAnotherSearch:
    def test_other_targets_and_another_loss_are_told(self, tmp_path):
        def other(outputs, targets):
            return squared_error(outputs, targets)

        Differentiable(**QUICK).search(regression(), folder=tmp_path)
        with pytest.raises(BitscapeError, match=r"another search: task.own_loss was 'squared_error, code .*' and is '.*other, code .*'"):
            Differentiable(**QUICK).search(regression(other), folder=tmp_path)
        changed = regression()
        changed.samples.parts[0].targets["level"].add_(1.0)
        with pytest.raises(BitscapeError, match="another search: targets was"):
            Differentiable(**QUICK).search(changed, folder=tmp_path)


class TestStepAsData:
    def test_any_step_can_be_searched_with(self):
        settings, seen = Asga(**QUICK), []

        def noted(mixed, learned):
            step = settings.make_step(mixed, learned)

            def counted(model, batch):
                seen.append(len(batch))
                return step(model, batch)

            return counted

        result, expected = mixture_search(planted(True), settings, noted), settings.search(planted(True))
        assert seen == [16] * 8
        assert result.policy == expected.policy and result.policy.provenance["method"] == "asga"

    def test_no_method_inherits_from_another(self):
        assert {kind.__mro__[1] for kind in (Differentiable, Seam, Asga)} == {MixtureSettings}


@pytest.mark.parametrize(("losses", "warned"), [((1.0, 11.0), True), ((1.0, 9.0), False), ((5.0,), False), ((2.0, 1.0), False)])
def test_a_search_whose_loss_rises_says_so(losses, warned, caplog, monkeypatch):
    records = tuple({"loss": loss} for loss in losses)
    monkeypatch.setattr("bitscape.searches.mixture_search.train", lambda *_, **__: TrainResult(records=records, ema=None))
    method = Differentiable(**QUICK)
    with caplog.at_level("WARNING", "bitscape.searches"):
        train_mixture(planted(True), method, method.make_step)
    assert ("the loss of the mixture search rose from 1 in its first epoch to 11" in caplog.text) == warned


def test_samples_of_several_shapes_are_refused():
    labels = torch.zeros(4, dtype=torch.int64)
    samples = Samples([*Samples.of(torch.ones(4, 1, 4, 4), labels).parts, *Samples.of(torch.ones(4, 1, 2, 8), labels).parts])
    message = r"data: samples of shapes \[\[1, 4, 4\]\] and \[\[1, 2, 8\]\] do not stack .* use method fisher, hawq, kl or local"
    for method in (Differentiable(**QUICK), Seam(**QUICK), Asga(**QUICK)):
        with pytest.raises(BitscapeError, match=message):
            method.search(planted_problem(planted(True).prepared, samples))
