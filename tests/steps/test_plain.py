import torch
from torch.nn import functional

from bitscape.engine import Batch
from bitscape.engine.step import CrossEntropy
from bitscape.steps import Plain
from tests.engine.tiny import tiny_batches, tiny_net


def test_the_gradient_is_autograds() -> None:
    images, labels = next(iter(tiny_batches().epoch(0)))
    model, twin = tiny_net().eval(), tiny_net().eval()
    record = Plain()(model, Batch.of(images, labels, CrossEntropy()))
    logits = twin(images)
    value = functional.cross_entropy(logits, labels)
    expected = torch.autograd.grad(value, list(twin.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert torch.equal(record.loss, value.detach()) and not record.loss.requires_grad
    assert int(record.sums[0]) == int((logits.argmax(1) == labels).sum())
