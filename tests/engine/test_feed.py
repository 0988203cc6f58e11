from collections.abc import Iterator

import pytest
import torch

from bitscape.data.batches import DIGITS, Batches
from bitscape.data.sources import load_dataset
from bitscape.engine.feed import Feed, for_all_workers, own_part, prefetch
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
    rest = list(Feed(batches=batches, device=torch.device("cpu"), channels_last=True).epoch(1, start=3))
    assert [fed.whole for fed in rest] == [16, 6]
    for fed, (expected, expected_labels) in zip(rest, whole[3:], strict=True):
        assert torch.equal(fed.part.inputs, expected) and torch.equal(fed.part.targets, expected_labels)
        assert fed.part.inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("images", "workers", "sizes"), [(11, 1, [4, 4, 3]), (11, 2, [4, 7]), (12, 2, [4, 4, 4]), (9, 1, [4, 5])])
def test_the_last_batch_has_two_images_for_every_worker(
    monkeypatch: pytest.MonkeyPatch, images: int, workers: int, sizes: list[int]
) -> None:
    monkeypatch.setattr("bitscape.engine.feed.world_size", lambda: workers)
    batches = for_all_workers(Batches(dataset=load_dataset("digits", limit=images), normalization=DIGITS, batch_size=4))
    assert [len(batch) for batch, _ in batches.epoch(0)] == sizes
    assert [whole for _, whole in own_part(batches, 0)] == sizes


def test_batches_of_another_kind_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitscape.engine.feed.world_size", lambda: 2)
    batches = tiny_batches(images=19)
    assert for_all_workers(batches) is batches
    assert [(len(own), whole) for own, whole in own_part(batches, 0)] == [(8, 16), (2, 3)]
