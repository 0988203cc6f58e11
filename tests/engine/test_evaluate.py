from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitscape.engine import NonFiniteError, evaluate
from bitscape.errors import BitscapeError
from tests.engine.tiny import Images, TinyBatches, tiny_batches, tiny_net


def test_counts_equal_a_direct_computation() -> None:
    batches = tiny_batches(images=50, classes=9)
    model = tiny_net(classes=9)
    accuracy = evaluate(model, batches)
    data = batches.dataset
    with torch.no_grad():
        logits = model.eval()(data.images)
    ranks = (logits > logits.gather(1, data.labels[:, None])).sum(1)
    assert accuracy.images == 50
    assert accuracy.top1 == pytest.approx(100 * (ranks == 0).double().mean().item())
    assert accuracy.top5 == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert accuracy.loss == pytest.approx(functional.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert accuracy.top1 < accuracy.top5 < 100.0


def test_each_module_keeps_its_own_training_flag() -> None:
    model = tiny_net().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, tiny_batches())
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_flags_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3)).train()
    with pytest.raises(BitscapeError):
        evaluate(model, tiny_batches())
    assert model.training and model[1].training


def test_bfloat16_is_close_to_float32() -> None:
    exact, rough = (evaluate(tiny_net(), tiny_batches(), autocast=dtype) for dtype in (None, torch.bfloat16))
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss


def test_a_device_argument_moves_the_model() -> None:
    model = tiny_net()
    assert evaluate(model, tiny_batches(), device="cpu") == evaluate(model, tiny_batches())


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_is_as_asked_for_and_changes_no_result(channels_last: bool) -> None:
    model = tiny_net()
    expected = evaluate(model, tiny_batches())
    assert model[0].weight.is_contiguous()
    accuracy = evaluate(model, tiny_batches(), channels_last=channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert accuracy.top1 == expected.top1 and accuracy.loss == pytest.approx(expected.loss, rel=1e-5)


def without_labels() -> TinyBatches:
    batches = tiny_batches()
    return replace(batches, dataset=replace(batches.dataset, labels=None))


def empty() -> TinyBatches:
    data = Images(name="nothing", images=torch.zeros(0, 2, 6, 6), labels=torch.zeros(0, dtype=torch.int64))
    return TinyBatches(dataset=data)


def unlabelled_by_minus_one() -> TinyBatches:
    batches = tiny_batches()
    return replace(batches, dataset=replace(batches.dataset, labels=batches.dataset.labels - 1))


class Wrapped(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": images, "features": images}


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (tiny_net(), without_labels(), "no labels"),
        (tiny_net(), empty(), "'nothing' is empty"),
        (tiny_net(), unlabelled_by_minus_one(), "has the label -1; labels count from 0"),
        (tiny_net(classes=2), tiny_batches(), r"label 2, the model has outputs 0\.\.1"),
        (nn.Conv2d(2, 4, 3), tiny_batches(), r"shape \(16, 4, 4, 4\)"),
        (Wrapped(), tiny_batches(), "returns dict"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(model: nn.Module, batches: TinyBatches, message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        evaluate(model, batches)


def test_float16_autocast_is_refused() -> None:
    with pytest.raises(BitscapeError, match="float16"):
        evaluate(tiny_net(), tiny_batches(), autocast=torch.float16)


def test_images_that_the_network_does_not_take_are_told_with_their_shape() -> None:
    batches = tiny_batches()
    narrow = replace(batches, dataset=replace(batches.dataset, images=batches.dataset.images[:, :1]))
    with pytest.raises(BitscapeError, match=r"fails on a batch of shape \(16, 1, 6, 6\), torch\.float32: .*check channels"):
        evaluate(tiny_net(), narrow)


def test_out_of_memory_stays_what_it_is() -> None:
    class Full(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(torch.OutOfMemoryError):
        evaluate(Full(), tiny_batches())


def test_a_nan_weight_is_an_error_and_no_accuracy() -> None:
    model = tiny_net()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"50 of 50 images of 'tiny' .*1 weight tensors are not finite, first 4\.weight"):
        evaluate(model.train(), tiny_batches(images=50))
    assert model.training


class Poisoned(nn.Module):
    """Flattens; the images whose first value is above 3 get `value` as a logit, in a layer or beside all layers."""

    def __init__(self, value: float, *, inside: bool) -> None:
        super().__init__()
        self.layer, self.value, self.inside = _Poison(value), value, inside

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = images.flatten(1)[:, :3]
        marked = images[:, 0, 0, 0] > 3
        return self.layer(logits, marked) if self.inside else poisoned(logits, marked, self.value)


class _Poison(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, logits: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
        return poisoned(logits, marked, self.value)


def poisoned(logits: torch.Tensor, marked: torch.Tensor, value: float) -> torch.Tensor:
    column = torch.arange(3) == 0
    return torch.where(marked[:, None] & column, value, logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])  # -inf leaves the loss of other labels finite
@pytest.mark.parametrize(("inside", "where"), [(True, r"first the output of layer 'layer' \(_Poison\)"), (False, "arises between layers")])
def test_one_bad_image_in_a_later_batch_is_found(value: float, inside: bool, where: str) -> None:
    batches = tiny_batches()
    data = batches.dataset
    data.images[:, 0, 0, 0] = 0.0
    (*_, (last, _)) = batches.epoch(0)
    row = int((data.images == last[-1]).flatten(1).all(1).nonzero())
    data.images[row, 0, 0, 0] = 4.0
    assert data.labels is not None
    data.labels[row] = 1
    with pytest.raises(NonFiniteError, match=rf"1 of 70 images .*{where}"):
        evaluate(Poisoned(value, inside=inside), batches)
