import math

import pytest
import torch
from torch import Tensor

from bitscape.engine.metrics import (
    Averaged,
    BinaryAccuracy,
    Collected,
    MeanIou,
    Metric,
    RelativeError,
    TopK,
    metric_of,
)
from bitscape.errors import BitscapeError

DRAWN = torch.Generator().manual_seed(0)


def no_label_left_out(labels: Tensor, classes: int) -> Tensor:
    return torch.zeros_like(labels, dtype=torch.bool)


@pytest.mark.parametrize(
    ("metric", "outputs", "targets"),
    [
        (TopK(), torch.randn(9, 7, generator=DRAWN), torch.arange(9) % 7),
        (MeanIou(no_label_left_out), torch.randn(9, 3, 4, generator=DRAWN), torch.arange(36).view(9, 4) % 3),
        (BinaryAccuracy(0.0), torch.randn(9, 2, generator=DRAWN), torch.arange(18).view(9, 2) % 2),
        (Averaged(lambda o, t: (o - t).square().mean(1)), torch.randn(9, 2, generator=DRAWN), torch.zeros(9, 2)),
    ],
)
def test_sums_of_batches_are_those_of_the_whole(metric: Metric, outputs: Tensor, targets: Tensor) -> None:
    whole = metric.sums(outputs, targets, 9)
    parts = [metric.sums(o, t, len(o)) for o, t in zip(outputs.split(4), targets.split(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)
    assert whole.dtype == torch.float64 and metric.name in metric.numbers(whole)


def test_top_five_of_fewer_classes_are_all() -> None:
    numbers = TopK().numbers(TopK().sums(torch.eye(3), torch.tensor([0, 1, 0]), 3))
    assert numbers == {"top1": pytest.approx(200 / 3), "top5": 100.0}


def test_a_relative_error_without_a_norm() -> None:
    metric = RelativeError(("a", "b"))
    zero, one = torch.zeros(2, 1), torch.ones(2, 1)
    same = metric.numbers(metric.sums({"a": zero, "b": one}, {"a": zero, "b": one}, 2))
    assert same == {"relative_error": 0.0, "relative_error.a": 0.0, "relative_error.b": 0.0}
    assert metric.numbers(metric.sums({"a": one, "b": one}, {"a": zero, "b": one}, 2))["relative_error"] == math.inf


def test_names_of_records_are_not_taken() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> float:
        return 0.0

    def dice(outputs: Tensor, targets: Tensor) -> float:
        return 0.0

    assert [metric_of(each).name for each in (loss, dice, lambda o, t: 0.0)] == ["metric", "dice", "metric"]


def test_what_collects_must_compute_a_number() -> None:
    class Table:
        def update(self, outputs: Tensor, targets: Tensor) -> None: ...

        def compute(self) -> dict[str, Tensor]:
            return {"confusion": torch.zeros(2, 2)}

    metric = metric_of(Table())
    assert isinstance(metric, Collected)
    with pytest.raises(BitscapeError, match=r"metric: Table.compute\(\) returns no single number"):
        metric.computed(metric.begun(torch.device("cpu")))
