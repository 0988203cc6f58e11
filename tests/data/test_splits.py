import logging

import pytest

from bitscape.data.splits import EVALUATION, TRAINING, are_splits, choose
from bitscape.errors import BitscapeError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "val"], True),
        (["training", "validation"], True),
        (["Train", "Test", "__MACOSX"], True),
        (["train", "valid", "meta"], True),
        (["test"], True),
        (["train", "bus", "car"], False),  # a class of vehicles
        (["cat", "dog"], False),
        (["val", "cat"], False),
        ([], False),
    ],
)
def test_folders_are_splits_or_classes(names, expected):
    assert are_splits(names) == expected


@pytest.mark.parametrize(
    ("split", "available", "expected"),
    [
        (EVALUATION, ["train", "val"], "val"),
        (EVALUATION, ["train", "validation"], "validation"),
        (EVALUATION, ["train", "val", "test"], "test"),
        (EVALUATION, ["Train", "Test"], "Test"),
        (TRAINING, ["train", "val"], "train"),
        (TRAINING, ["testing", "training"], "training"),
        ("val", ["train", "val", "test"], "val"),
    ],
)
def test_the_first_split_that_is_there_is_meant(split, available, expected):
    assert choose(split, available, "photos") == expected


def test_another_default_than_the_first_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="bitscape.data"):
        choose(EVALUATION, ["train", "test"], "photos")
        choose("val", ["train", "val"], "photos")
        assert caplog.messages == []
        choose(EVALUATION, ["train", "val"], "photos")
    assert caplog.messages == ["photos: using its split 'val'"]


@pytest.mark.parametrize(("split", "wanted"), [("test", "test"), (EVALUATION, "test"), ("vall", "vall'; nearest: val")])
def test_a_split_that_is_not_there_is_an_error(split, wanted):
    available = ["train"] if wanted == "test" else ["train", "val"]
    with pytest.raises(BitscapeError, match=f"photos: no split '{wanted}.*there are train"):
        choose(split, available, "photos")
