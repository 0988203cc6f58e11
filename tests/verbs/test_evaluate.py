"""bs.evaluate on networks, data, tasks and metrics of many forms."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import bitscape as bs
from bitscape.engine import NonFiniteError
from bitscape.engine.task import Binary, Follow

DRAWN = torch.Generator().manual_seed(0)
INPUTS = torch.randn(22, 4, generator=DRAWN)
LABELS = torch.randint(7, (22,), generator=DRAWN)


class Given(nn.Module):
    """Returns what it is called with, so that tests say what comes out."""

    def forward(self, outputs: Any) -> Any:
        return outputs


class Linear(nn.Module):
    def __init__(self, outputs: int = 7) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layer = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits


def generated() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(INPUTS.split(5), LABELS.split(5), strict=True)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ((INPUTS, LABELS), None),
        ({"x": INPUTS, "label": LABELS.to(torch.int32)}, 5),
        (TensorDataset(INPUTS, LABELS), 5),
        (DataLoader(TensorDataset(INPUTS, LABELS), batch_size=5, shuffle=True), None),
        (generated(), None),
    ],
)
def test_classes_are_counted_whatever_the_form_and_batches(data: Any, size: int | None) -> None:
    network = Linear().train()
    seen = bs.evaluate(network, data, batch_size=size)
    logits = network(INPUTS).detach()
    five = (logits.topk(5).indices == LABELS[:, None]).any(1)
    assert seen.metric == "top1" and seen.samples == 22 and network.training
    assert seen.value == seen.numbers["top1"] == pytest.approx(100 * float((logits.argmax(1) == LABELS).float().mean()))
    assert seen.numbers["top5"] == pytest.approx(100 * float(five.float().mean()))
    assert seen.numbers["loss"] == pytest.approx(float(functional.cross_entropy(logits, LABELS)), rel=1e-6)


def test_logits_in_a_structure_and_probabilities_as_targets() -> None:
    class Wrapped(Linear):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    assert bs.evaluate(Wrapped(), (INPUTS, LABELS)) == bs.evaluate(Linear(), (INPUTS, LABELS))
    soft = functional.one_hot(LABELS, 7).float()
    expected = bs.evaluate(Linear(), (INPUTS, LABELS)).numbers
    assert bs.evaluate(Linear(), (INPUTS, soft), task="classes").numbers == pytest.approx(expected)


def test_mean_iou_of_dense_classes_by_hand() -> None:
    # Of the first image's four positions 0, 0, 1 are decided, the last is left out; of the second's one is right.
    decided = torch.tensor([[0, 0, 1, 2], [2, 0, 0, 0]])
    labels = torch.tensor([[0, 1, 1, 255], [2, -100, 1, 255]], dtype=torch.int16)
    logits = 5.0 * functional.one_hot(decided, 4).movedim(-1, 1).float()
    seen = bs.evaluate(Given(), [(logits[:1], labels[:1]), (logits[1:], labels[1:])])
    # Class 0: 1 of 3, class 1: 1 of 3, class 2: 1 of 1; class 3 does not occur.
    assert seen.metric == "mean_iou" and seen.value == pytest.approx(100 * (1 / 3 + 1 / 3 + 1) / 3)
    assert seen.numbers["accuracy"] == pytest.approx(60.0)
    counted = labels.long().masked_fill(labels == 255, -100)
    assert seen.numbers["loss"] == pytest.approx(float(functional.cross_entropy(logits, counted)), rel=1e-6)


def test_label_255_is_a_class_where_there_are_more() -> None:
    logits = torch.zeros(1, 300, 2)
    logits[0, 255] = 9.0
    seen = bs.evaluate(Given(), (logits, torch.tensor([[255, 255]])), task="dense")
    assert seen.numbers["mean_iou"] == seen.numbers["accuracy"] == 100.0


def test_answers_of_yes_or_no() -> None:
    logits, answers = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]), torch.tensor([1, 1, 1, 0])
    seen = bs.evaluate(Given(), (logits, answers))
    expected = functional.binary_cross_entropy_with_logits(logits[:, 0], answers.float())
    assert (seen.metric, seen.value) == ("accuracy", 75.0) and seen.numbers["loss"] == pytest.approx(float(expected))
    after = bs.evaluate(Given(), (logits.sigmoid(), answers), task=Binary(probabilities=True))
    assert after.value == 75.0 and after.numbers["loss"] == pytest.approx(float(expected), rel=1e-5)


class Heads(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"boxes": [100 * x * self.factor], "scores": x + 1, "best": x.argmax(1)}


def test_relative_errors_of_all_outputs_to_a_reference() -> None:
    network, reference = Heads(1.5), Heads(1.0)
    for data in ([INPUTS], list(INPUTS.split(5)), generated()):
        seen = bs.evaluate(network, data, reference=reference)
        assert seen.metric == "relative_error" and seen.samples == 22
        assert seen.value == pytest.approx(0.25)
        assert seen.numbers["relative_error.boxes.0"] == pytest.approx(0.5)
        assert seen.numbers["relative_error.scores"] == 0.0


class EndToEnd(nn.Module):
    """A detector whose cells of all images lie one behind the other."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.reshape(-1, 2)


def test_outputs_that_lie_end_to_end_are_compared_image_by_image() -> None:
    seen = bs.evaluate(EndToEnd(1.5), [INPUTS], reference=EndToEnd(1.0))
    assert (seen.metric, seen.value, seen.samples) == ("relative_error", pytest.approx(0.5), 22)
    targets = EndToEnd(2.0)(INPUTS)
    task = Follow({"output0": 1.0})
    (rows, highest) = task.read_targets(targets, 22)
    assert torch.equal(rows["output0"], 2 * INPUTS) and highest == -1
    assert bs.evaluate(EndToEnd(1.0), [(INPUTS, targets)], task="follow").value == pytest.approx(0.5)


def test_a_sigmoid_behind_which_values_are_moved_gives_probabilities() -> None:
    network = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Flatten(0))
    answers = (network(INPUTS) > 0.5).long()
    assert 0 < int(answers.sum()) < 22
    assert bs.evaluate(network, (INPUTS, answers)).numbers["accuracy"] == 100.0


def test_a_regression_is_compared_with_its_targets() -> None:
    seen = bs.evaluate(Given(), (INPUTS, 2 * INPUTS))
    assert (seen.metric, seen.value) == ("relative_error", pytest.approx(0.5))
    one = bs.evaluate(Given(), (INPUTS[:, :1], 2 * INPUTS[:, 0]))  # (n, 1) and (n,) are not broadcast
    assert one.value == pytest.approx(0.5)


def test_a_metric_of_the_users_is_averaged_over_samples() -> None:
    def distance(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().sum(1)

    by_sample = bs.evaluate(Given(), (INPUTS, 2 * INPUTS), metric=distance, batch_size=5)
    expected = float(INPUTS.abs().sum(1).mean())
    assert by_sample.metric == "distance" and by_sample.numbers == {"distance": pytest.approx(expected)}
    scalar = bs.evaluate(Given(), (INPUTS, 2 * INPUTS), metric=lambda o, t: float(distance(o, t).mean()), batch_size=5)
    assert scalar.metric == "metric" and scalar.value == pytest.approx(expected)
    both = bs.evaluate(Given(), (INPUTS, 2 * INPUTS), metric=distance, loss=functional.mse_loss)
    assert both.numbers["loss"] == pytest.approx(float(INPUTS.square().mean()))
    loss = bs.evaluate(Given(), (INPUTS, 2 * INPUTS), loss=functional.mse_loss)
    assert (loss.metric, loss.value) == ("loss", both.numbers["loss"])


class Range:
    """As torchmetrics has them: it collects, then computes; several numbers."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def update(self, outputs: dict[str, Tensor], targets: Tensor) -> None:
        self.values.append(outputs["x"] * targets)

    def compute(self) -> dict[str, Tensor]:
        values = torch.cat(self.values)
        return {"most": values.max(), "least": values.min(), "all": values}


def test_a_metric_that_collects_sees_the_whole_set_and_is_left_alone() -> None:
    metric, batches = Range(), [({"x": part}, 2.0 * torch.ones(1)) for part in INPUTS[:, 0].split(5)]
    for _ in range(2):
        seen = bs.evaluate(Given(), batches, metric=metric, inputs=lambda batch: (batch[0],))
        assert (seen.metric, seen.value, seen.samples) == ("Range", 2 * float(INPUTS[:, 0].max()), 22)
        assert seen.numbers["least"] == 2 * float(INPUTS[:, 0].min()) and "all" not in seen.numbers
    assert metric.values == []


def test_functions_say_how_a_batch_is_read() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    batches = [(INPUTS, INPUTS, {"class": INPUTS.argmax(1)})]
    seen = bs.evaluate(Sum(), batches, inputs=lambda b: {"a": b[0], "b": b[1]}, targets=lambda b: b[2]["class"])
    assert seen.value == 100.0


def test_as_the_engine_counts_digits() -> None:
    from bitscape.data.batches import DIGITS
    from bitscape.engine import evaluate as by_engine

    batches = bs.Batches(dataset=bs.load_dataset("digits", limit=50), normalization=DIGITS, batch_size=16)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    seen, expected = bs.evaluate(network, batches), by_engine(network, batches)
    assert seen.numbers == {"top1": expected.top1, "top5": expected.top5, "loss": expected.loss}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data": INPUTS}, "a batch has no labels"),
        ({"data": (INPUTS, LABELS + 1)}, r"label 7, the model has outputs 0\.\.6"),
        ({"data": (INPUTS, LABELS), "reference": Linear(), "task": "classes"}, "reference: task 'classes' looks at targets"),
        ({"data": (INPUTS, INPUTS.argmax(1)), "task": "dense"}, "task='dense': the model returns shape"),
        ({"data": (INPUTS, INPUTS[:, :3]), "task": "follow"}, "output output0 has 7 values for each sample, and what it follows 3"),
        ({"data": (INPUTS, LABELS.float()), "task": "classes"}, r"targets are torch.float32 of shape \(22,\); task 'classes' needs"),
        ({"data": (INPUTS, LABELS), "task": "binary"}, "targets are from 0 to 6; task 'binary' needs 0 or 1"),
        ({"data": (INPUTS, LABELS), "metric": Range}, "metric is the class Range; give an instance"),
        ({"data": (INPUTS, LABELS), "metric": "iou"}, "metric is 'iou'; it must be a function"),
        ({"data": (INPUTS, LABELS), "batch_size": -1}, "batch_size is -1"),
        ({"data": iter([])}, "data: it holds no batch"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(bs.BitscapeError, match=said):
        bs.evaluate(Linear(), **arguments)


def test_outputs_that_are_not_finite_are_an_error() -> None:
    broken = INPUTS.clone()
    broken[7, 0] = torch.inf
    for data in ((broken, LABELS), zip(broken.split(5), LABELS.split(5), strict=True)):
        with pytest.raises(NonFiniteError, match="1 of 22 images of 'the data' give outputs that are not finite"):
            bs.evaluate(Linear(), data)
