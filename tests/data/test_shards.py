import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from bitscape.data.shards import expand
from bitscape.data.sources import load_dataset
from bitscape.errors import BitscapeError


def picture(value, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(value, label=None):
    files = [(f"{value:04}.png", picture(value))]
    return files if label is None else [*files, (f"{value:04}.cls", str(label).encode())]


def values(dataset):
    return dataset.images[:, 0, 0, 0].tolist()


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"train-{shard:04}.tar", [file for row in range(4) for file in sample(4 * shard + row, row)])
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{0..1}-{5..6}.tar", ["0-5.tar", "0-6.tar", "1-5.tar", "1-6.tar"]),
        ("a-{2..1}.tar", []),
    ],
)
def test_ranges_in_braces(pattern, names):
    assert [path.name for path in expand(pattern)] == names


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("{0..100000}.tar", "100,001"),
        ("{0..999999}-{000..999}.tar", "1,000,000,000"),
        (f"{{0..{10**18 - 1}}}.tar", "1,000,000,000,000,000,000"),
    ],
)
def test_a_pattern_of_very_many_files_is_refused_before_they_are_listed(pattern, count):
    with pytest.raises(BitscapeError, match=rf"names {count} files; at most 100,000 are read"):
        expand(pattern)


def test_as_many_files_as_are_allowed():
    assert len(expand("{1..100000}.tar")) == 100_000


@pytest.mark.parametrize("source", ["train-{0000..0002}.tar", ""])
def test_a_range_and_a_folder_of_tar_files(shards, source):
    data = load_dataset(str(shards / source))
    assert values(data) == list(range(12))
    assert data.labels.tolist() == [0, 1, 2, 3] * 3
    assert data.class_names == ("0", "1", "2", "3")


def test_a_part_of_a_range_and_a_single_file(shards):
    assert values(load_dataset(str(shards / "train-{0001..0002}.tar"))) == list(range(4, 12))
    assert values(load_dataset(str(shards / "train-0001.tar"))) == [4, 5, 6, 7]


def test_a_limit_draws_over_all_files(shards):
    five = load_dataset(str(shards), limit=5, seed=1)
    assert values(five) == values(load_dataset(str(shards), limit=9, seed=1))[:5]
    assert [value % 4 for value in values(five)] == five.labels.tolist()


def test_split_folders_of_tar_files(shards, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "all" / split).mkdir(parents=True)
    (shards / "train-0000.tar").rename(tmp_path / "all" / "test" / "a.tar")
    assert values(load_dataset(str(tmp_path / "all"), split="test")) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "label"),
    [({"label": 3, "width": 4}, 3), ({"cls": 1, "label": 2}, 1), ({"fine_label": 2}, 2), (2, 2)],
)
def test_labels_in_json(tmp_path, content, label):
    write_tar(tmp_path / "a.tar", [("x.jpg", picture(9, "JPEG")), ("x.json", json.dumps(content).encode())])
    assert load_dataset(str(tmp_path / "a.tar")).labels.tolist() == [label]


def test_json_without_a_label_and_other_files_are_passed_over(tmp_path):
    files = [("d/x.webp", picture(9, "WEBP")), ("d/x.json", b'{"width": 4}'), ("d/x.txt", b"a cat"), ("e/x.png", picture(5))]
    data = load_dataset(str(write_tar(tmp_path / "a.tar", files)))
    assert (values(data), data.labels) == ([9, 5], None)


def test_a_name_goes_up_to_its_first_dot(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.rgb.png", picture(9)), ("x.cls", b"1\n"), ("y.png", picture(7)), ("y.depth.cls", b"0")])
    assert load_dataset(str(tmp_path / "a.tar")).labels.tolist() == [1, 0]


def test_broken_images_are_skipped(tmp_path, caplog):
    files = [("bad.png", picture(1)[:40]), ("bad.cls", b"0"), *[file for value in range(10, 20) for file in sample(value, 1)]]
    data = load_dataset(str(write_tar(tmp_path / "a.tar", files)))
    assert (values(data), data.labels.tolist()) == (list(range(10, 20)), [1] * 10)
    assert "skipped 1 of 11 images, unreadable: a.tar/bad.png" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images in its 1 tar files"),
        ([("a.txt", b"x")], "no images in its 1 tar files"),
        ([("a.png", b""), ("a.cls", b"cat")], r"a\.tar/a\.cls: the label is b'cat'; it must be a whole number"),
        ([("a.png", b""), ("a.cls", b"-1")], "the label is -1"),
        ([("a.png", b""), ("a.json", b'{"label": "cat"}')], "the label is 'cat'"),
        ([("a.png", b""), ("a.json", b"{")], "the label is b'{'"),
        ([("a.png", b""), ("b.png", b""), ("b.cls", b"1")], "2 images, 1 labels in .cls or .json; each image needs one beside it"),
        ([("a.png", b""), ("b.cls", b"1")], "1 images, 1 labels"),
        ([("a.png", b""), ("a.right.png", b"")], r"a\.right\.png is the second image of its sample"),
        ([("a.png", b""), ("a.cls", b"1099511627776")], r"a\.cls: the label is 1099511627776; it must be a whole number from 0 to 999999"),
    ],
)
def test_what_does_not_fit_together_is_an_error(tmp_path, files, message):
    with pytest.raises(BitscapeError, match=message):
        load_dataset(str(write_tar(tmp_path / "a.tar", files)))


def test_missing_and_damaged_and_compressed_files_are_named(shards):
    with pytest.raises(BitscapeError, match=r"train-0003\.tar: damaged, compressed, or no tar file \(.*No such file"):
        load_dataset(str(shards / "train-{0000..0003}.tar"))
    write_tar(shards / "zipped.tar", sample(1), "w:gz")
    with pytest.raises(BitscapeError, match=r"zipped\.tar: damaged, compressed"):
        load_dataset(str(shards / "zipped.tar"))
    content = (shards / "train-0001.tar").read_bytes()
    for length in (0, 100, 600, 3000):
        (shards / "cut.tar").write_bytes(content[:length])
        with pytest.raises(BitscapeError, match=r"cut\.tar"):
            load_dataset(str(shards / "cut.tar"))


def test_an_empty_range_is_an_error(shards):
    with pytest.raises(BitscapeError, match="no images in its 0 tar files"):
        load_dataset(str(shards / "train-{0002..0001}.tar"))


def member(name, content=b"", **claims):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in claims.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse(name, size):
    header = bytearray(member(name, type=tarfile.GNUTYPE_SPARSE, size=512))
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    header[483:495] = (0x80 << 88 | size).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("0.cls", str(2**64).encode()), r"0\.cls: the label is 18446744073709551616; it must be a whole number from 0 to 999999"),
        (member("0.json", b"[" * 100_000), r"0\.json: the label is b'\["),
        (member("0.cls", b"0", size=2**43), r"0\.cls has 8,796,093,022,208 bytes; allowed are 1,048,576"),
        (member("1.png", b"0", size=2**43), r"1\.png has 8,796,093,022,208 bytes; allowed are 268,435,456|unexpected end of data"),
        (sparse("0.cls", 2**32), r"0\.cls is stored as a sparse file; write the tar without --sparse"),
        (sparse("1.png", 2**32), r"1\.png is stored as a sparse file"),
        (member("x", b"0", type=tarfile.XHDTYPE, size=2**43), r"a header claims 8796093022208 bytes; allowed are 1048576|damaged"),
        (member("x", b"0", type=tarfile.GNUTYPE_LONGNAME, size=2**43), r"a header claims 8796093022208 bytes|damaged"),
    ],
)
def test_what_a_tar_claims_is_checked_before_it_is_read(tmp_path, hostile, message):
    path = tmp_path / "a.tar"
    path.write_bytes(member("0.png", picture(1)) + hostile + bytes(1024))
    with pytest.raises(BitscapeError, match=rf"a\.tar.*({message})"):
        load_dataset(str(path))
