import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitscape.engine import Batch, BatchLoss, Cosine, NonFiniteError, Sgd, StepRecord, train
from bitscape.engine import loop as loop_module
from bitscape.engine.checkpoint import load_checkpoint
from bitscape.engine.forward import as_logits, loop_forward
from bitscape.engine.step import CrossEntropy
from bitscape.errors import BitscapeError
from bitscape.quant.convert import bypassed
from bitscape.quant.layers import quantized_layers
from bitscape.sharpness import Ball
from bitscape.steps import Plain, Sam, Saq, SharpSettings
from bitscape.steps.sam import across, add_share
from tests.engine.tiny import same_state, tiny_batches
from tests.sharpness.small import batch, gradients, quantized, same, small_net, whole

pytestmark = pytest.mark.slow

STEPS = [Sam(), Saq(case=1), Saq(case=2), Saq(case=3)]
IDS = ["sam", "case 1", "case 2", "case 3"]


def used_by(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and under "<layer>.Q" what the layer's weight quantizer returns under the present hooks."""
    with torch.no_grad():
        weights = {f"{name}.Q": layer.weight_quantizer(layer.weight) for name, layer in quantized_layers(model).items()}
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *weights.items())}


class Spy:
    """A loss that notes the tensors of every pass."""

    def __init__(self, model: nn.Module, loss: BatchLoss = cross_entropy) -> None:
        self.model, self.loss = model, loss
        self.passes: list[dict[str, Tensor]] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.passes.append(used_by(self.model))
        return self.loss(logits, labels)

    def for_batch(self, _images: Tensor) -> BatchLoss:
        return self


def one_step(
    settings: SharpSettings, model: nn.Module, loss: BatchLoss = cross_entropy
) -> tuple[StepRecord, dict[str, Tensor], dict[str, Tensor]]:
    """Record of the first step, and the tensors of its two passes."""
    spy = Spy(model, loss)
    record = settings.build()(model, whole(*batch(), spy))
    first, second = spy.passes
    return record, first, second


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


# Radius 0, and what a step leaves as it was.


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_radius_0_is_the_plain_step_bit_for_bit(settings: SharpSettings, interval: int) -> None:
    model, twin = small_net(dropout=0.5), small_net(dropout=0.5)
    step, (images, labels) = replace(settings, rho=0.0, interval=interval).build(), batch()
    for seed in range(3):
        seen = []
        for net, take in ((model, step), (twin, Plain())):
            net.zero_grad()
            torch.manual_seed(seed)
            record = take(net, whole(images, labels))
            seen.append((record.loss, record.sums, torch.rand(3), gradients(net)))
        (*values, found), (*expected, plain) = seen
        assert all(torch.equal(one, other) for one, other in zip(values, expected, strict=True)) and same(found, plain)
        assert same_state(model, twin)


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_statistics_are_taken_once_and_both_passes_drop_the_same(settings: SharpSettings) -> None:
    model, twin = small_net(dropout=0.5), small_net(dropout=0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    model[3].register_forward_hook(lambda _m, inputs, out: seen.append((inputs[0] != 0, out != 0)))
    torch.manual_seed(3)
    replace(settings, rho=0.05).build()(model, whole(*batch()))
    torch.manual_seed(3)
    Plain()(twin, whole(*batch()))
    assert int(model[1].num_batches_tracked) == 1 and same_state(model, twin)
    assert not same(gradients(model), gradients(twin))
    (one, kept), (other, kept_again) = seen
    both = one & other
    assert torch.equal(kept[both], kept_again[both]) and 0.4 < float(kept[both].float().mean()) < 0.6


# The radius.


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_the_radius_is_a_share_of_the_members_length_or_a_length(settings: SharpSettings) -> None:
    for relative in (True, False):
        record, first, second = one_step(replace(settings, rho=0.01, relative=relative), small_net())
        names = [name for name in first if "weight_quantizer" not in name and not name.endswith((".Q", "0.weight", "4.weight", "6.weight"))]
        # Case 1 measures the latent weights, along whose gradient it moves the quantized ones.
        measured = ("0.Q", "4.Q", "6.Q") if settings == Saq() else ("0.weight", "4.weight", "6.weight")
        length = float(flat({name: first[name] for name in (*names, *measured)}).norm())
        assert float(record.extras["rho"]) == pytest.approx(0.01 * length if relative else 0.01, rel=1e-5)
        moved = ("0.weight", "4.weight", "6.weight") if settings.ball.weights == "latent" else ("0.Q", "4.Q", "6.Q")
        e = flat({name: second[name].double() - first[name].double() for name in (*names, *moved)})
        assert float(e.norm()) == pytest.approx(float(record.extras["rho"]), rel=1e-3)  # sums of float32


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_asam_measures_weights_and_gains_by_their_size(settings: SharpSettings) -> None:
    _, first, second = one_step(replace(settings, rho=0.1, relative=False, adaptive=True), small_net())
    weights = ("0.weight", "4.weight", "6.weight")
    moved = weights if settings.ball.weights == "latent" else ("0.Q", "4.Q", "6.Q")
    sizes = moved if settings == Saq() else weights
    e = [(second[name] - first[name]) / (first[size].abs() + 0.01) for name, size in zip(moved, sizes, strict=True)]
    e.append((second["1.weight"] - first["1.weight"]) / (first["1.weight"].abs() + 0.01))
    rest = ("0.bias", "1.bias", "4.bias", "6.bias", *(f"{name}.input_quantizer.scale" for name in "046"))
    e += [second[name] - first[name] for name in rest]
    assert float(torch.cat([each.flatten() for each in e]).norm()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_switches_choose_what_moves(settings: SharpSettings) -> None:
    _, first, second = one_step(replace(settings, rho=0.05, norms=False, biases=False, clips=False), small_net())
    weights = {f"{name}.weight" for name in "046"} if settings.ball.weights == "latent" else set()
    assert {name for name in first if not torch.equal(first[name], second[name])} == {"0.Q", "4.Q", "6.Q"} | weights


# Descent, interval, reuse.


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_the_sum_is_that_of_both_gradients(settings: SharpSettings) -> None:
    found, plain, perturbed = small_net(), small_net(), small_net()
    replace(settings, rho=0.05, descent="sum").build()(found, whole(*batch()))
    Plain()(plain, whole(*batch()))
    replace(settings, rho=0.05).build()(perturbed, whole(*batch()))
    one, other = gradients(plain), gradients(perturbed)
    assert same(gradients(found), {name: one[name] + other[name] for name in one})
    assert not torch.equal(one["0.weight"], other["0.weight"])


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_every_so_many_th_step_is_perturbed_and_the_others_are_plain(settings: SharpSettings) -> None:
    model, twin = small_net(), small_net()
    spy, step = Spy(model), replace(settings, rho=0.05, interval=3).build()
    counts = []
    for _ in range(7):
        before = len(spy.passes)
        for net in (model, twin):
            net.zero_grad()
        record = step(model, whole(*batch(), spy))
        Plain()(twin, whole(*batch()))
        counts.append(len(spy.passes) - before)
        assert same(gradients(model), gradients(twin)) == (counts[-1] == 1)
        assert set(record.extras) == ({"rho", "gap", "ascent_norm", "gap_of_predicted"} if counts[-1] == 2 else set())
    assert counts == [2, 1, 1, 2, 1, 1, 2]


def test_the_part_across_by_hand() -> None:
    perturbed = {"b": torch.tensor([1.0]), "a": torch.tensor([3.0, 4.0])}
    plain = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0])}
    # <(3, 4, 1), (1, 0, 1)> / 2 = 2
    assert same(across(perturbed, plain), {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([-1.0])})
    assert same(across(plain, {name: 0 * g for name, g in plain.items()}), plain)


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_what_is_kept_is_the_perturbed_gradient_less_its_part_along_the_plain_one_as_a_share_of_that(settings: SharpSettings) -> None:
    model, twin = small_net(), small_net()
    reusing = replace(settings, rho=0.05, interval=2, reuse="orthogonal")
    step = reusing.build()
    step(model, whole(*batch()))
    kept = {name.removeprefix("kept."): value for name, value in step.state_dict().items() if name != "steps"}
    with reusing.ball.watched(twin) as ascent:
        record = whole(*batch()).backward(twin)
    rho = 0.05 * flat(ascent.values()).norm().float()
    with ascent.applied(ascent.factor(rho)), reusing.ball.watched(twin) as second:
        whole(*batch()).backward(twin)
    g, g_s, v = (flat({name: each[name] for name in ascent.gradients}) for each in (ascent.gradients, second.gradients, kept))
    assert record.loss > 0 and kept.keys() == ascent.gradients.keys()
    assert abs(float(v @ g)) < 1e-5 * float(v.norm() * g.norm())
    torch.testing.assert_close(v, (g_s - (g_s @ g) / (g @ g) * g) / g.norm(), rtol=1e-3, atol=1e-5)
    assert float(v.norm()) > 0.01  # else the test would be of rounding errors


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_what_is_added_is_the_straight_through_image_in_the_stated_proportion(settings: SharpSettings) -> None:
    model, twin = small_net(), small_net()
    reusing = replace(settings, rho=0.05, interval=2, reuse="orthogonal", reuse_share=0.4)
    step = reusing.build()
    step(model, whole(*batch()))
    kept = {name.removeprefix("kept."): value for name, value in step.state_dict().items() if name != "steps"}
    model.zero_grad()
    step(model, whole(*batch()))
    Plain()(twin, whole(*batch()))
    plain = gradients(twin)
    added = {name: value - plain[name] for name, value in gradients(model).items()}
    image = dict(kept)
    if settings == Saq():
        weights = {name: getattr(twin, name).weight for name in "046"}
        twin.zero_grad()
        sum((getattr(twin, name).weight_quantizer(w) * kept[f"{name}.weight"]).sum() for name, w in weights.items()).backward()
        image |= {name: g for name, g in gradients(twin).items() if name.endswith("weight") or "weight_quantizer" in name}
        assert image["4.weight_quantizer.scale"].abs().max() > 0
    own = flat({name: plain[name] for name in image}).norm()
    assert float(flat({name: added[name] for name in image}).norm() / own) == pytest.approx(0.4 * float(flat(image).norm()), rel=1e-4)
    for name, value in added.items():
        expected = image[name] * (0.4 * own).float() if name in image else torch.zeros_like(value)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_what_is_frozen_or_has_no_gradient_gets_nothing() -> None:
    model = small_net()
    kept = {name: torch.ones_like(value) for name, value in model.named_parameters() if name in ("0.weight", "4.bias", "6.bias")}
    model[0].weight_quantizer.requires_grad_(False)
    Plain()(model, whole(*batch()))
    model[4].bias.grad = None
    before = gradients(model)
    add_share(model, Ball(), kept, 1.0)
    assert model[0].weight_quantizer.scale.grad is None and model[4].bias.grad is None
    assert {name for name, value in gradients(model).items() if not torch.equal(value, before[name])} == {"0.weight", "6.bias"}


# Batches in parts.


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
def test_parts_of_a_batch_are_perturbed_by_the_gradient_of_all(settings: SharpSettings) -> None:
    cut, together = small_net(norm=False), small_net(norm=False)
    loose = replace(settings, rho=0.02)
    spy = Spy(cut)
    record = loose.build()(cut, Batch.of(*batch(), spy, 3))
    expected, first, second = one_step(loose, together)
    assert len(spy.passes) == 6
    assert all(same(seen, first) for seen in spy.passes[:3])
    for seen in spy.passes[3:]:
        assert same(seen, spy.passes[3])
        torch.testing.assert_close(seen, second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(cut), gradients(together), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(record.extras), dict(expected.extras), rtol=1e-3, atol=1e-5)


# Within the loop.

USUAL: dict[str, Any] = {"optimizer": Sgd(lr=0.05), "epochs": 2, "schedule": Cosine()}
REUSING = {"rho": 0.02, "interval": 3, "reuse": "orthogonal"}


def deep_net(*, dropout: float = 0.2) -> nn.Module:
    """Convolutions whose weights lie in another memory order under channels_last, a norm, dropout."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        net = nn.Sequential(*first, nn.Dropout(dropout), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(80, 3))
    return quantized(net, images=tiny_batches().dataset.images[:12])


def test_accumulated_gradients_train_as_whole_batches_do() -> None:
    cut, together = small_net(norm=False), small_net(norm=False)
    batches = tiny_batches(images=16)
    usual = {**USUAL, "epochs": 1, "step": Saq(rho=0.02)}
    (one,) = train(cut, batches, **usual, accumulate=2).records
    (other,) = train(together, batches, **usual).records
    torch.testing.assert_close(cut.state_dict(), together.state_dict())
    assert [one[name] for name in ("loss", "rho", "gap")] == pytest.approx([other[name] for name in ("loss", "rho", "gap")], rel=1e-3)


class Killed(Exception):
    pass


def kill_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the next run when so many batches are in its checkpoint, and another one is done."""
    done: list[None] = []

    def count(_pace: object) -> None:
        done.append(None)
        if len(done) > batches:
            raise Killed

    monkeypatch.setattr(loop_module.Pace, "count_step", count)


@pytest.mark.parametrize("settings", [Sam(**REUSING), *(Saq(case=case, **REUSING) for case in (1, 2, 3))], ids=IDS)
def test_a_resumed_run_equals_the_uninterrupted_one(settings: SharpSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = deep_net()
    whole_run = train(expected, tiny_batches(), step=settings, **USUAL).records  # 10 steps: 0, 3, 6 and 9 are perturbed
    for killed_after in (4, 7):
        folder, model = tmp_path / str(killed_after), deep_net()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(killed_after, patch)
            train(model, tiny_batches(), step=settings, **USUAL, folder=folder, checkpoint_every_s=0.0)
        stored, _ = load_checkpoint(folder / "checkpoint.safetensors")
        assert int(stored["step.steps"]) == killed_after and bool(stored["step.kept.3.weight"].any())
        model = deep_net()
        records = train(model, tiny_batches(), step=settings, **USUAL, folder=folder).records
        assert same_state(model, expected)
        assert all(one[name] == other[name] for one, other in zip(records, whole_run, strict=True) for name in ("loss", "gap", "rho"))


def test_settings_serve_several_runs() -> None:
    settings, one, other = Saq(**REUSING), deep_net(), deep_net()
    for model in (one, other):
        train(model, tiny_batches(), step=settings, **{**USUAL, "epochs": 1})
    assert same_state(one, other)


def test_rounding_of_autocast_does_not_erase_the_perturbation() -> None:
    model = small_net(norm=False, bits=8)
    images, labels = batch()

    def read(output: object, samples: int) -> torch.Tensor:
        return as_logits(output, samples, highest_label=2)

    with bypassed(model, "input_quantizer"), loop_forward(model, autocast=torch.bfloat16, compiled=False, read=read):
        for share in (3e-4, 3e-3):
            record = Saq(rho=share).build()(model, whole(images, labels))
            assert float(record.extras["gap_of_predicted"]) == pytest.approx(1, abs=0.03)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
@pytest.mark.parametrize(("interval", "compilations"), [(1, 0), (2, 1)])
def test_plain_steps_are_compiled_once_and_train_alike(interval: int, compilations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(shutil, "which", lambda name: name)  # the backend above needs no compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    found, expected = small_net(dropout=0.2, bits=8), small_net(dropout=0.2, bits=8)
    usual = {**USUAL, "epochs": 1, "step": Saq(rho=0.02, interval=interval)}
    (record,) = train(found, tiny_batches(images=64), **usual, compile=True).records  # 4 steps
    (alike,) = train(expected, tiny_batches(images=64), **usual).records
    assert len(graphs) == compilations
    assert record["gap"] == pytest.approx(alike["gap"], rel=1e-3)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)


@dataclass
class OfRoot:
    """A loss that is finite, with a gradient that is not."""

    def for_batch(self, _images: Tensor) -> BatchLoss:
        return lambda logits, labels: cross_entropy(logits, labels) + (logits - logits.detach()).abs().sum().sqrt()


@pytest.mark.parametrize("settings", STEPS, ids=IDS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_first_pass_that_is_not_finite_stops_the_run_and_moves_nothing(settings: SharpSettings, where: str) -> None:
    model, batches = small_net(norm=False), tiny_batches()
    if where == "loss":
        batches.dataset.images[:] = torch.nan
    before = copy.deepcopy(model)
    loss = OfRoot() if where == "gradient" else CrossEntropy()
    with pytest.raises(NonFiniteError, match="epoch 1 of 2, batch 0"):
        train(model, batches, step=settings, **USUAL, loss=loss)
    assert same_state(model, before)


# Settings.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Sam(rho=-0.1), r"rho = -0.1: a radius of at least 0"),
        (lambda: Sam(rho=float("nan")), r"rho = nan: a radius of at least 0"),
        (lambda: Sam(rho=float("inf")), r"rho = inf: a radius of at least 0"),
        (lambda: Sam(interval=0), r"interval = 0: at least 1"),
        (lambda: Sam(reuse="orthogonal"), r"reuse = 'orthogonal' with interval = 1: .*give an interval"),
        (lambda: Sam(interval=2, reuse_share=0.0), r"reuse_share = 0.0: it must be above 0"),
        (lambda: Sam(adaptive=True), r"relative = True, adaptive = True: .*give relative=False"),
        (lambda: Sam(descent="summed"), r"descent = 'summed': allowed are 'perturbed', 'sum'"),
        (lambda: Sam(reuse="across"), r"reuse = 'across': allowed are 'none', 'orthogonal'"),
    ],
)
def test_wrong_settings_are_explained(wrong: Callable[[], SharpSettings], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        wrong()
