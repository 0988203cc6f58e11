from collections.abc import Iterator

import pytest
import torch

from bitscape.engine.feed import feed, prefetch
from tests.engine.tiny import tiny_batches


@pytest.mark.parametrize("ahead", [1, 4, 50])
def test_prefetch_keeps_the_order_and_does_not_run_far_ahead(ahead: int) -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    taken = []
    for number in prefetch(numbers(), ahead):
        taken.append(number)
        assert len(made) <= len(taken) + ahead
    assert taken == list(range(20))


def test_prefetch_passes_errors_on_after_the_items_before_them() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    items = prefetch(numbers(), 3)
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_feed_starts_in_the_middle_and_lays_images_out_channels_last() -> None:
    batches = tiny_batches()
    whole = list(batches.epoch(1))
    rest = list(feed(batches, 1, start=3, device=torch.device("cpu"), channels_last=True))
    assert len(rest) == 2
    for (images, labels), (expected, expected_labels) in zip(rest, whole[3:], strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
        assert images.is_contiguous(memory_format=torch.channels_last)
