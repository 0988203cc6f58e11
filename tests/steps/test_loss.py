import pytest
import torch
from torch.nn import functional

from bitscape.errors import BitscapeError
from bitscape.steps.loss import Loss, distillation_loss
from tests.engine.tiny import tiny_batches, tiny_net

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, 1.0]])
LABELS = torch.tensor([0, 1])


def test_without_a_teacher_it_is_cross_entropy() -> None:
    images = torch.zeros(2, 2, 6, 6)
    assert torch.equal(Loss().for_batch(images)(LOGITS, LABELS), functional.cross_entropy(LOGITS, LABELS))
    smooth = Loss(label_smoothing=0.3).for_batch(images)(LOGITS, LABELS)
    log_shares = LOGITS.log_softmax(1)
    expected = -(0.7 * log_shares[range(2), LABELS] + 0.1 * log_shares.sum(1)).mean()
    assert smooth == pytest.approx(expected.item())


def test_the_teachers_term_is_a_divergence() -> None:
    other = LOGITS.flip(1)
    shares = (other / 4).softmax(1)
    expected = 16 * (shares * (shares.log() - (LOGITS / 4).log_softmax(1))).sum(1).mean()
    assert distillation_loss(LOGITS, other, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(LOGITS, LOGITS, 4.0).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(BitscapeError, match="student's classes"):
        distillation_loss(LOGITS, LOGITS[:, :2], 1.0)


def test_the_teacher_runs_once_in_eval_mode_without_gradients() -> None:
    images, labels = next(iter(tiny_batches().epoch(0)))
    teacher = tiny_net(seed=1).train()
    calls: list[bool] = []
    teacher.register_forward_pre_hook(lambda module, _inputs: calls.append(module.training))
    loss = Loss(teacher=teacher, distillation=0.25, temperature=2.0).for_batch(images)
    logits = tiny_net()(images)
    value = loss(logits, labels)
    loss(logits, labels)
    value.backward()
    assert calls == [False]
    assert teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        followed = distillation_loss(logits, teacher.eval()(images), 2.0)
        expected = 0.75 * functional.cross_entropy(logits, labels) + 0.25 * followed
    assert value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"distillation": 0.5}, "no teacher"),
        ({"teacher": tiny_net()}, "distillation is 0.0 with a teacher"),
        ({"teacher": tiny_net(), "distillation": 1.5}, "distillation is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        Loss(**wrong)
