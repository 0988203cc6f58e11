import os

import numpy as np
import pytest

from bitscape.data import cache
from bitscape.data.cache import cache_file, read_cache, write_cache


@pytest.fixture
def images():
    return np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)


def test_what_is_written_is_read(tmp_path, images):
    file = tmp_path / "new" / "a.npy"
    write_cache(file, images)
    assert np.array_equal(read_cache(file, 2), images)
    assert [entry.name for entry in file.parent.iterdir()] == ["a.npy"]


def test_nothing_kept_is_none(tmp_path):
    assert read_cache(tmp_path / "a.npy", 2) is None


@pytest.mark.parametrize("length", [0, 5, 100, 200])
def test_a_damaged_file_is_not_used(tmp_path, images, length):
    file = tmp_path / "a.npy"
    write_cache(file, images)
    file.write_bytes(file.read_bytes()[:length])
    assert read_cache(file, 2) is None


@pytest.mark.parametrize(
    ("old", "new"), [(b"'descr'", b"'de(cr'"), (b"|u1", b"|O8"), (b"(2, 3", b"(9**9"), (b"(2, 3", b"(2,-3"), (b"'shape': (", b"'shape': [")]
)
def test_a_damaged_header_is_not_used(tmp_path, images, old, new):
    file = tmp_path / "a.npy"
    write_cache(file, images)
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    assert read_cache(file, 2) is None


def test_another_number_of_images_is_not_used(tmp_path, images):
    write_cache(tmp_path / "a.npy", images)
    assert read_cache(tmp_path / "a.npy", 3) is None


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, images):
    (tmp_path / "file").write_text("in the way")
    write_cache(tmp_path / "file" / "a.npy", images)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path, images, monkeypatch):
    def full(stream, array, **settings):
        stream.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(cache.np, "save", full)
    write_cache(tmp_path / "a.npy", images)
    assert list(tmp_path.iterdir()) == []


def test_very_large_sets_are_not_kept(tmp_path, images, monkeypatch):
    monkeypatch.setattr(cache, "MAX_BYTES", 10)
    write_cache(tmp_path / "a.npy", images)
    assert list(tmp_path.iterdir()) == []


def test_the_place_depends_on_file_time_length_and_size(tmp_path, monkeypatch):
    monkeypatch.setenv("BITSCAPE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.parquet"
    file.write_text("x")
    os.utime(file, ns=(0, 0))
    places = {cache_file([file], None), cache_file([file], 32), cache_file([file], 32, "part")}
    os.utime(file, ns=(1, 1))
    places.add(cache_file([file], None))
    file.write_text("xy")
    os.utime(file, ns=(1, 1))
    places.add(cache_file([file], None))
    assert len(places) == 5
    assert {place.parent for place in places} == {tmp_path / "cache"}


def test_without_the_variable_it_is_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("BITSCAPE_CACHE", raising=False)
    monkeypatch.setattr(cache.Path, "home", lambda: tmp_path)
    (tmp_path / "a").write_text("")
    assert cache_file([tmp_path / "a"], None).parent == tmp_path / ".cache" / "bitscape"
