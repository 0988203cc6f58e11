import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bitscape.data import mapped, sources
from bitscape.data.batches import UNIT, Batches
from bitscape.data.sources import load_dataset
from bitscape.errors import BitscapeError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BITSCAPE_CACHE", str(folder))
    monkeypatch.setattr(sources, "MEMORY_BYTES", 20 * 3 * 4 * 4 - 1)  # what twenty images of 4x4 pixels take, less one byte
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two classes of eleven images, of which one cannot be read."""
    for label in range(2):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for row in range(11):
            Image.fromarray(np.full((5, 6, 3), 11 * label + row, np.uint8)).save(tmp_path / "data" / str(label) / f"{row:02}.png")
    (tmp_path / "data" / "1" / "03.png").write_bytes(b"broken")
    return tmp_path / "data"


def test_a_large_set_is_the_same_as_a_small_one_and_lies_in_a_file(folder, cache, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "bitscape.data"):
        large = load_dataset(str(folder), size=4)
    assert "22 decoded images of 4x4 pixels take 0.0 GB of disk, kept as" in caplog.text
    assert "skipped 1 of 22 images" in caplog.text
    (file,) = [path for path in cache.glob("*.npy") if "kept" not in path.name]
    assert np.load(file).shape == (22, 3, 4, 4)
    monkeypatch.setattr(sources, "MEMORY_BYTES", 10**9)
    small = load_dataset(str(folder), size=4)
    assert torch.equal(large.images, small.images) and torch.equal(large.labels, small.labels)
    one, other = (list(Batches(dataset=d, normalization=UNIT, shuffle=True, batch_size=8).epoch(1)) for d in (large, small))
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(one, other, strict=True))


def test_without_a_size_the_first_image_tells_it(folder, cache):
    data = load_dataset(str(folder))
    assert data.images.shape == (21, 3, 5, 6)
    assert len(list(cache.glob("*.npy"))) == 2


def test_what_is_there_is_not_decoded_again_until_a_file_changes(folder, monkeypatch):
    first = load_dataset(str(folder), size=4)
    with monkeypatch.context() as patched:
        patched.setattr(mapped, "decode_images", None)
        again = load_dataset(str(folder), size=4)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    Image.fromarray(np.full((5, 6, 3), 200, np.uint8)).save(folder / "0" / "00.png")
    assert load_dataset(str(folder), size=4).images[0, 0, 0, 0] == 200


def test_a_draw_is_small_and_a_large_draw_has_a_file_of_its_own(folder, cache):
    load_dataset(str(folder), size=4, limit=10)
    assert list(cache.iterdir()) == []
    one, other = (load_dataset(str(folder), size=4, limit=21, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.images, other.images)
    assert len(list(cache.glob("*.kept.npy"))) == 2


def test_a_killed_run_leaves_nothing_that_counts(folder, cache, monkeypatch):
    def killed(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mapped, "decode_images", killed)
        with pytest.raises(KeyboardInterrupt):
            load_dataset(str(folder), size=4)
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    monkeypatch.setattr(mapped.Path, "unlink", lambda *args, **settings: None)  # killed outright: the part stays
    monkeypatch.setattr(mapped, "decode_images", killed)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(str(folder), size=4)
    monkeypatch.undo()
    monkeypatch.setenv("BITSCAPE_CACHE", str(cache))
    monkeypatch.setattr(sources, "MEMORY_BYTES", 10)
    assert len(load_dataset(str(folder), size=4)) == 21
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("what", ["cut", "header", "shape", "rows", "beyond"])
def test_a_damaged_file_is_named_with_what_to_do(folder, cache, what):
    load_dataset(str(folder), size=4)
    (file,) = [path for path in cache.glob("*.npy") if "kept" not in path.name]
    kept = file.with_name(f"{file.stem}.kept.npy")
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "header":
        file.write_bytes(file.read_bytes().replace(b"'descr'", b"'de(cr'"))
    elif what == "shape":
        np.save(file, np.zeros((22, 3, 4, 5), np.uint8))
    else:
        np.save(kept, np.arange(21.0) if what == "rows" else np.arange(2, 23))
    with pytest.raises(BitscapeError, match=rf"{file.name}: damaged \(.*\); remove it, and the images are decoded again"):
        load_dataset(str(folder), size=4)


def test_a_file_that_cannot_be_read_for_no_told_reason_is_named_too(folder, cache, monkeypatch):
    load_dataset(str(folder), size=4)

    def fail(*_, **__):
        raise EOFError

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(BitscapeError, match=r"damaged \(EOFError\); remove it"):
        load_dataset(str(folder), size=4)


def test_a_disk_without_room_says_how_much_it_would_take(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        BitscapeError, match=r"data: 22 decoded images of 4x4 pixels take 0\.0 GB, and .* has 0\.0 GB left; set BITSCAPE_CACHE"
    ):
        load_dataset(str(folder), size=4)


def test_a_folder_that_cannot_be_made_is_an_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BITSCAPE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BitscapeError, match=r"take 0\.0 GB, which .* does not take \(.*; set BITSCAPE_CACHE to a folder with room"):
        load_dataset(str(folder), size=4)


def test_too_many_broken_images_leave_no_file(folder, cache):
    for row in range(5):
        (folder / "0" / f"{row:02}.png").write_bytes(b"")
    with pytest.raises(BitscapeError, match="more than a tenth of its 22 images"):
        load_dataset(str(folder), size=4)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
