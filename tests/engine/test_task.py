import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional

from bitscape.engine.dense import Dense
from bitscape.engine.outputs import softmax_roots
from bitscape.engine.task import Binary, Classes, Follow, Task, TaskName, task_of
from bitscape.engine.user_task import User
from bitscape.errors import BitscapeError
from bitscape.steps import Loss

IMAGES = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def linear(outputs: int, *last: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, outputs), *last).eval()


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (linear(3), Classes()),
        (linear(2), Classes()),
        (linear(1, nn.Sigmoid()), Binary(probabilities=True)),
        (linear(1, nn.Sigmoid(), nn.Flatten(0)), Binary(probabilities=True)),
    ],
)
def test_the_shape_of_the_outputs_tells_the_task(model: nn.Module, task: Task) -> None:
    assert task_of(model, IMAGES) == task


class After(nn.Module):
    """A linear layer of one output, and what follows it."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 1), last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.linear(x))


PROBABILITIES = {
    "squeezed": lambda x: x.sigmoid().squeeze(1),
    "flattened": lambda x: x.sigmoid().flatten(),
    "reshaped": lambda x: x.sigmoid().reshape(-1).contiguous(),
    "picked": lambda x: x.sigmoid()[:, 0],
    "deeper": lambda x: x.sigmoid().unsqueeze(1).transpose(1, 2),
    "another type": lambda x: x.sigmoid().double().squeeze(-1),
    "clamped": lambda x: x.sigmoid().clamp(1e-6, 1 - 1e-6),
    "put together": lambda x: torch.cat([x[:8].sigmoid(), x[8:].sigmoid()]),
}
NO_PROBABILITIES = {
    "logits": lambda x: x.squeeze(1),
    "scaled": lambda x: 3 * x.sigmoid().squeeze(1),
    "put together with others": lambda x: torch.cat([x[:8].sigmoid(), x[8:]]),
}


@pytest.mark.parametrize("last", PROBABILITIES.values(), ids=PROBABILITIES)
def test_a_sigmoid_is_seen_behind_whatever_moves_its_values(last: Any) -> None:
    model, answers = After(last).eval(), torch.arange(16) % 2
    assert task_of(model, IMAGES) == Binary(probabilities=True)
    assert task_of(model, IMAGES, "binary") == Binary(probabilities=True)
    assert task_of(model, IMAGES, targets=answers) == Binary(probabilities=True)


@pytest.mark.parametrize("last", NO_PROBABILITIES.values(), ids=NO_PROBABILITIES)
def test_what_computes_with_a_sigmoid_gives_no_probabilities(last: Any) -> None:
    model, answers = After(last).eval(), torch.arange(16) % 2
    assert task_of(model, IMAGES).name == "follow"
    assert task_of(model, IMAGES, "binary") == Binary()
    assert task_of(model, IMAGES, targets=answers) == Binary()


@pytest.mark.parametrize("model", [linear(1), linear(1, nn.Flatten(0)), linear(8, nn.Unflatten(1, (2, 2, 2)))])
def test_any_other_outputs_are_followed_in_units_of_their_spread(model: nn.Module) -> None:
    task = task_of(model, IMAGES)
    assert isinstance(task, Follow)
    spread = float(model(IMAGES).detach().std(unbiased=False))
    assert task.spreads == {"output0": pytest.approx(spread)}
    torch.testing.assert_close(task.outputs(model(IMAGES), len(IMAGES)), model(IMAGES).reshape(len(IMAGES), -1) / spread)


class Heads(nn.Module):
    """Outputs of several forms, scales and types."""

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"boxes": [100 * x, x.unflatten(1, (2, 2))], "cells": x.reshape(1, -1, 2), "best": x.argmax(1)}


def test_each_output_of_a_structure_is_followed_in_its_own_unit() -> None:
    task = task_of(Heads(), IMAGES)
    assert isinstance(task, Follow)
    assert list(task.spreads) == ["boxes.0", "boxes.1", "cells"]
    assert task.spreads["boxes.0"] == pytest.approx(100 * task.spreads["boxes.1"])
    rows = task.outputs(Heads()(IMAGES), len(IMAGES))
    torch.testing.assert_close(rows, (IMAGES / task.spreads["cells"]).repeat(1, 3))


def test_outputs_that_change_or_do_not_part_among_images_are_refused() -> None:
    with pytest.raises(BitscapeError, match=r"the model returns output0, and boxes before"):
        Follow({"boxes": 1.0}).outputs(IMAGES, len(IMAGES))
    with pytest.raises(BitscapeError, match=r"output output0 has shape \(3,\) for 2 images"):
        Follow().outputs(torch.zeros(3), 2)
    with pytest.raises(BitscapeError, match="no floating-point tensor"):
        Follow().outputs({"best": torch.zeros(2, dtype=torch.int64)}, 2)


def test_a_task_that_is_asked_for_is_taken() -> None:
    assert task_of(linear(3), IMAGES, "follow").name == "follow"
    assert task_of(linear(3), IMAGES, "binary") == Binary()
    assert task_of(linear(3, nn.Sigmoid()), IMAGES, "binary") == Binary(probabilities=True)


def test_constant_outputs_have_the_unit_one() -> None:
    model = linear(1)
    nn.init.zeros_(model.get_parameter("0.weight"))
    assert task_of(model, IMAGES) == Follow({"output0": 1.0})


def test_answers_are_classes_or_yes_and_no_or_none() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.7, 0.6]])
    assert Classes().answers(logits).tolist() == [1, 0]
    assert Dense().answers(logits[:, :, None]).tolist() == [[1], [0]]
    assert Binary().answers(torch.tensor([-0.1, 0.1])).tolist() == [False, True]
    assert Binary(probabilities=True).answers(torch.tensor([0.4, 0.6])).tolist() == [False, True]
    assert Follow().answers(logits) is None and User().answers(logits) is None


def test_divergence_of_classes_in_closed_form() -> None:
    reference, logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    q = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(Classes().divergence(logits, reference), [-0.5 * np.log(4 * q * (1 - q)), 0.0], rtol=1e-5, atol=1e-7)


def test_divergence_of_yes_and_no_is_that_of_two_classes() -> None:
    outputs, reference = torch.tensor([[0.3], [-2.0]]), torch.tensor([[1.0], [0.5]])
    both = [torch.cat([torch.zeros(2, 1), values], 1) for values in (outputs, reference)]
    torch.testing.assert_close(Binary().divergence(outputs, reference), Classes().divergence(*both))
    after = Binary(probabilities=True).divergence(outputs.sigmoid(), reference.sigmoid())
    torch.testing.assert_close(after, Binary().divergence(outputs, reference), rtol=1e-4, atol=1e-6)


def test_divergence_of_followed_outputs_is_half_the_squared_difference() -> None:
    reference = torch.zeros(2, 3)
    outputs = torch.tensor([[2.0, 0.0, 2.0], [0.0, 0.0, 4.0]])
    task = Follow({"output0": 2.0})
    assert task.divergence(task.outputs(outputs, 2), task.outputs(reference, 2)).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("task", "shape"), [(Classes(), (3,)), (Binary(), (3,)), (Follow(), (3,)), (User(), (3,)), (Dense(), (3, 1)), (Dense(), (3, 2, 2))]
)
@pytest.mark.parametrize("draws", [1, 3, 4])
def test_squared_gradients_of_drawn_losses_expect_to_the_curvature_of_the_divergence(
    task: Task, shape: tuple[int, ...], draws: int
) -> None:
    values = torch.linspace(-1.0, 0.7, math.prod(shape), dtype=torch.float64).reshape(shape)
    curvature = hessian(lambda moved: task.divergence(moved.reshape(1, *shape), values[None])[0], values.flatten()).diagonal()
    outputs = values.expand(20_000, *shape).clone().requires_grad_()
    losses = task.drawn_losses(outputs, torch.Generator().manual_seed(0), draws=draws)
    assert losses.shape == (draws, 20_000)
    gradients = [torch.autograd.grad(loss.sum(), outputs, retain_graph=True)[0] for loss in losses]
    squares = torch.stack(gradients).square().mean((0, 1)).flatten()
    torch.testing.assert_close(squares, curvature, rtol=0.06, atol=0)


@pytest.mark.parametrize("task", [Classes(), Binary(), Follow({}), User()])
def test_the_curved_loss_is_flat_at_the_outputs_and_bends_like_the_divergence(task: Task) -> None:
    values = torch.tensor([[0.2, -1.0, 0.7]], dtype=torch.float64, requires_grad=True)
    loss = task.curved_loss(values, torch.Generator()).sum()
    (gradient,) = torch.autograd.grad(loss, values, create_graph=True)
    assert gradient.abs().max() < 1e-12
    expected = hessian(lambda moved: task.divergence(moved[None], values[0].detach()[None])[0], values[0].detach())
    for column in range(3):
        (bent,) = torch.autograd.grad(gradient[0, column], values, retain_graph=True)
        torch.testing.assert_close(bent[0], expected[column], atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize(("task", "shape"), [(Classes(), (4, 3)), (Dense(), (4, 3, 5)), (Binary(), (4, 3)), (Follow({}), (4, 3))])
def test_no_direction_has_a_negative_curvature(task: Task, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    outputs = torch.tanh(torch.einsum("kj,nj...->nk...", weight, inputs))  # not linear in the weight
    (slope,) = torch.autograd.grad(task.curved_loss(outputs, generator).mean(), weight, create_graph=True)
    rows = [torch.autograd.grad(each, weight, retain_graph=True)[0].flatten() for each in slope.flatten()]
    assert torch.linalg.eigvalsh(torch.stack(rows)).min() > -1e-12


def smooth(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return functional.smooth_l1_loss(outputs["x"], targets, reduction="none").sum(1)


@pytest.mark.parametrize("loss", [smooth, lambda outputs, targets: smooth(outputs, targets).mean()])
def test_a_loss_of_the_users_is_scored_by_the_targets_where_there_are_any(loss: Any) -> None:
    task, generator = User(loss), torch.Generator().manual_seed(0)
    raw, targets = IMAGES.clone().requires_grad_(), torch.zeros(16, 4)
    outputs = task.outputs({"x": raw}, 16)
    torch.testing.assert_close(outputs, IMAGES)
    (gradient,) = torch.autograd.grad(task.drawn_losses(outputs, generator, targets, 4).sum(), raw, retain_graph=True)
    torch.testing.assert_close(gradient, IMAGES.clamp(-1, 1))  # of each sample's own loss
    (bent,) = torch.autograd.grad(task.curved_loss(outputs, generator, targets).sum(), raw, create_graph=True)
    assert float(bent.detach().abs().max()) < 1e-6  # without what is linear
    (unit,) = torch.autograd.grad(task.drawn_losses(task.outputs({"x": raw}, 16), generator).sum(), raw)
    assert set(unit.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    ("model", "targets", "task"),
    [
        (linear(3), torch.zeros(16, dtype=torch.int64), Classes()),
        (linear(3), torch.full((16, 3), 0.5), None),
        (linear(3), torch.eye(3).repeat(6, 1)[:16], Classes()),
        (linear(3), torch.eye(3, dtype=torch.int64).repeat(6, 1)[:16], Classes()),
        (linear(3), torch.ones(16, 3), Binary()),
        (linear(3, nn.Sigmoid()), torch.eye(3).repeat(6, 1)[:16], Binary(probabilities=True)),
        (linear(1), torch.arange(16.0)[:, None] % 2, Binary()),
        (linear(3), torch.zeros(16), None),
        (linear(6, nn.Unflatten(1, (3, 2))), torch.zeros(16, 2, dtype=torch.uint8), Dense()),
        (linear(6, nn.Unflatten(1, (3, 2))), torch.zeros(16, 2), None),
        (linear(1), torch.ones(16, dtype=torch.bool), Binary()),
        (linear(1, nn.Flatten(0)), torch.ones(16, dtype=torch.int64), Binary()),
        (linear(1, nn.Sigmoid()), torch.ones(16), Binary(probabilities=True)),
        (linear(1), torch.arange(16), None),
    ],
)
def test_targets_tell_the_task(model: nn.Module, targets: Tensor, task: Task | None) -> None:
    seen = task_of(model, IMAGES, "auto", targets)
    assert seen == task or (task is None and isinstance(seen, Follow))


def test_several_inputs_tell_the_task() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    many = torch.cat([IMAGES] * 5)
    assert task_of(Sum(), (many, many)) == task_of(Sum(), {"a": many, "b": many}) == Classes()
    followed = task_of(Sum(), (many, many), "follow")
    assert isinstance(followed, Follow) and followed.spreads["output0"] == pytest.approx(2 * float(many[:64].std(unbiased=False)))


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(BitscapeError, match=r"task='denser': allowed are 'auto', 'classes', 'dense', 'binary', 'follow'; nearest: dense"):
        task_of(linear(3), IMAGES, "denser")  # type: ignore[arg-type]  # that is the fault


def test_divergence_of_dense_classes_is_the_mean_over_positions() -> None:
    outputs, reference = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    by_position = [Classes().divergence(outputs[:, :, i, j], reference[:, :, i, j]) for i in range(4) for j in range(5)]
    torch.testing.assert_close(Dense().divergence(outputs, reference), torch.stack(by_position).mean(0))


def test_as_many_draws_as_classes_give_the_softmaxs_hessian_whole() -> None:
    logits = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 9.0, 0.0]])
    roots = softmax_roots(logits, 4, torch.Generator().manual_seed(0))
    chances = logits.softmax(1)
    hessian = chances.diag_embed() - chances[:, :, None] * chances[:, None]
    torch.testing.assert_close(torch.einsum("dnc,dnk->nck", roots, roots) / 4, hessian)


def test_draws_leave_out_no_products_but_those_of_unlikely_classes() -> None:
    """Of two draws and three classes the first and the last by probability share a column."""
    chances = torch.tensor([[0.9, 0.0999, 1e-4]])
    hessian = chances.diag_embed() - chances[:, :, None] * chances[:, None]
    for seed in range(3):
        roots = softmax_roots(chances.log(), 2, torch.Generator().manual_seed(seed))
        found = torch.einsum("dnc,dnk->nck", roots, roots) / 2
        torch.testing.assert_close(found, hessian, atol=0.02, rtol=0)
        assert not torch.allclose(found, hessian, atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", [Classes(), Dense(), Binary(), Follow()], ids=lambda task: task.name)
def test_what_is_drawn_for_a_sample_does_not_depend_on_its_batch(task: Task) -> None:
    outputs = torch.randn(40, 5, 3, generator=torch.Generator().manual_seed(0))
    outputs = outputs[..., 0] if task.name == "classes" else outputs
    generator = torch.Generator().manual_seed(1)
    whole = task.drawn_losses(outputs, torch.Generator().manual_seed(1), draws=2)
    parts = [task.drawn_losses(part, generator, draws=2) for part in outputs.split([1, 17, 22])]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ((torch.zeros(2, 1), torch.zeros(2, 1)), "returns tuple.*method local"),
        (torch.zeros(()), r"returns shape \(\) for 2 images"),
        (torch.zeros(3, 1), r"returns shape \(3, 1\) for 2 images"),
        (torch.tensor([[0.0], [math.nan]]), "outputs of image 1 are not finite"),
        (torch.tensor([0.0, math.inf]), "outputs of image 1 are not finite"),
    ],
)
def test_outputs_of_another_kind_are_refused(output: Tensor, message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        Binary().outputs(output, 2)


def test_classes_need_two_outputs() -> None:
    with pytest.raises(BitscapeError, match="task='classes': a softmax over one output is always 1; use task='follow' or 'binary'"):
        Classes().outputs(torch.zeros(2, 1), 2)
    with pytest.raises(BitscapeError, match=r"allowed: \(n, classes\)"):
        Classes().outputs(torch.zeros(2, 3, 4), 2)


@pytest.mark.parametrize("name", ["auto", "follow", "binary"])
def test_numbers_of_classes_are_no_values_to_follow(name: TaskName) -> None:
    class Deciding(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).argmax(1)

    with pytest.raises(BitscapeError, match=r"no floating-point tensor|returns torch\.int64, as of classes"):
        task_of(Deciding(linear(3)), IMAGES, name)


def test_outputs_of_two_heads_side_by_side_are_no_classes_of_two_images():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return torch.stack([self.first(x)[:, 0], self.second(x)[:, 0]])  # (2, n)

    assert task_of(Heads(), torch.randn(20, 4)).name == "follow"


@pytest.mark.parametrize(
    ("name", "shape", "task"),
    [("auto", (7, 3), Classes(probabilities=True)), ("classes", (7, 3), Classes(probabilities=True)),
     ("dense", (7, 3, 2, 2), Dense(probabilities=True))],
)
def test_probabilities_of_classes_mean_what_their_logits_mean(name, shape, task):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = task_of(nn.Softmax(1), values, name)
    of_logits = Classes() if len(shape) == 2 else Dense()
    assert found == task and task_of(nn.Identity(), values, name) == of_logits
    moved = 0.5 * values
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0]).reshape(7, *(1 for _ in shape[2:]))
    labels = labels.expand(7, *shape[2:])
    read = found.outputs(values.softmax(1), 7), found.outputs(moved.softmax(1), 7)
    divergences = of_logits.divergence(moved, values)
    torch.testing.assert_close(found.divergence(read[1], read[0]), divergences)
    torch.testing.assert_close(found.loss(read[0], labels), of_logits.loss(values, labels))
    assert found.outputs(torch.eye(3)[:, :, None] if shape[2:] else torch.eye(3), 3).isfinite().all()


def test_a_teacher_of_probabilities_teaches_by_its_logits():
    values, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    losses = [
        Loss(teacher=teacher, distillation=1.0).for_batch(values)(0.5 * values, labels)
        for teacher in (nn.Identity(), nn.Softmax(1))
    ]
    torch.testing.assert_close(losses[1], losses[0])
