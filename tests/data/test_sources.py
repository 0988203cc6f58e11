import io
import json
import logging
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitscape.data import encoded, sources
from bitscape.data.sources import Dataset, load_dataset
from bitscape.errors import BitscapeError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BITSCAPE_CACHE", str(folder))
    return folder


def png(value, height=4, width=4):
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path, cells, labels=None, names=None, column="image"):
    arrays = {column: pa.array([{"bytes": cell, "path": f"{row}.png"} for row, cell in enumerate(cells)])}
    if labels is not None:
        arrays["label"] = pa.array(labels)
    table = pa.table(arrays)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return str(path)


def values(dataset):
    return dataset.images[:, 0, 0, 0].tolist()


@pytest.fixture
def twenty(tmp_path):
    return write_parquet(tmp_path / "twenty.parquet", [png(value) for value in range(20)], [v % 5 for v in range(20)])


# Dataset


def images(count=4, height=3, width=3):
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, height, width)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": images().float()}, r"torch\.float32 of shape \(4, 1, 3, 3\); they must be uint8"),
        ({"images": images()[0]}, r"shape \(1, 3, 3\)"),
        ({"images": images(0)}, "none of the sizes 0"),
        ({"labels": torch.tensor([0, 1, 2])}, r"4 images need int64 of shape \(4,\)"),
        ({"labels": torch.tensor([0, 1, 0, 1], dtype=torch.int32)}, r"labels are torch\.int32"),
        ({"labels": torch.tensor([0.0, 1, 0, 1])}, r"labels are torch\.float32"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "from 0 to 2; 2 class names allow 0 to 1"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "from -1 to 1"),
    ],
)
def test_a_dataset_checks_what_it_is_given(fields, message):
    with pytest.raises(BitscapeError, match=message):
        Dataset(**{"name": "here", "images": images(), "class_names": ("a", "b"), **fields})


def test_subsets_keep_labels_and_names():
    data = Dataset("here", images(), torch.tensor([0, 1, 1, 0]), ("a", "b"))
    for index in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])):
        part = data.subset(index, "part")
        assert (part.name, values(part), part.labels.tolist(), part.class_names) == ("part", [1, 2], [1, 1], ("a", "b"))
    assert values(data.subset(torch.tensor([3, 3, 0]))) == [3, 3, 0]
    assert data.subset(slice(1)).name == "here"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 4]), "index runs from 0 to 4; here has rows 0 to 3"),
        (torch.tensor([-1]), "index runs from -1"),
        (torch.tensor([0.0]), r"torch\.float32"),
        (torch.tensor([True]), "n booleans"),
        (torch.tensor([[0]]), r"shape \(1, 1\)"),
        (torch.tensor([], dtype=torch.int64), "none of the sizes 0"),
    ],
)
def test_bad_subsets_are_errors(index, message):
    with pytest.raises(BitscapeError, match=message):
        Dataset("here", images()).subset(index)


def test_cropping_keeps_the_centre():
    picture = torch.arange(30, dtype=torch.uint8).view(1, 1, 5, 6)
    assert Dataset("here", picture).cropped(1).images.flatten().tolist() == [14]
    assert torch.equal(Dataset("here", picture).cropped(5).images, picture[..., :5])
    with pytest.raises(BitscapeError, match=r"size=6 exceeds the 5x6 images; use resized\(6\)"):
        Dataset("here", picture).cropped(6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_resizing_gives_a_square(height, width, size):
    assert Dataset("here", images(2, height, width)).resized(size).images.shape == (2, 1, size, size)


def test_resizing_to_the_same_size_changes_nothing():
    noise = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(Dataset("here", noise).resized(8).images, noise)


# digits and npz


def test_the_digits_are_there():
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.labels.bincount().tolist() == [36] * 10
    assert train.class_names == tuple("0123456789")
    assert (train.images.min(), train.images.max()) == (0, 255)
    # counts of the original: 1797 images, 178 zeros ... 180 nines
    both = torch.cat([train.labels, test.labels]).bincount().tolist()
    assert both == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digit_labels_belong_to_their_images():
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    distances = torch.cdist(test.images.flatten(1).float(), train.images.flatten(1).float())
    assert (train.labels[distances.argmin(1)] == test.labels).float().mean() > 0.97


def test_an_unknown_split_of_the_digits_is_an_error():
    with pytest.raises(BitscapeError, match="digits: no split 'training'; nearest: train; there are test, train"):
        load_dataset("digits", split="training")


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 3, 4, 6), (5, 4, 6, 3), (5, 1, 4, 6), (5, 4, 6, 1)])
def test_npz_layouts(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, 1, 2, 1, 0], np.int16))
    data = load_dataset(str(tmp_path / "a.npz"))
    assert data.images.shape[2:] == (4, 6)
    assert data.images.shape[1] == (1 if len(shape) == 3 or 1 in shape else 3)
    assert torch.equal(data.images.sort().values.sum((1, 2, 3)), torch.from_numpy(pixels.reshape(5, -1).sum(1)).long())
    assert data.labels.tolist() == [0, 1, 2, 1, 0]
    assert data.class_names == ("0", "1", "2")


def test_npz_channels_last_is_transposed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, class_names=np.array(["x", "y"]))
    data = load_dataset(str(tmp_path / "a.npz"))
    assert np.array_equal(data.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert data.labels is None
    assert data.class_names == ("x", "y")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 4, 4), np.uint8)}, "no array 'images' among image; nearest: image"),
        ({"images": np.zeros((2, 4, 4))}, "images are torch.float64"),
        ({"images": np.zeros((2, 2, 4, 4), np.uint8)}, r"shape \(2, 2, 4, 4\); allowed"),
        ({"images": np.zeros((2, 16), np.uint8)}, r"shape \(2, 16\); allowed"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "labels are float64; they must be integers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, r"need int64 of shape \(2,\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "labels run from -1"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**40])},
            "largest label is 1099511627776",
        ),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2]), "class_names": np.array(["a", "b"])},
            "2 class names allow 0 to 1",
        ),
        ({"images": np.array([None, "x"])}, "no .npz file of plain arrays"),
    ],
)
def test_bad_npz_contents_are_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BitscapeError, match=message):
        load_dataset(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_npz_is_an_error(tmp_path, part):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8))
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(BitscapeError, match=r"a\.npz: damaged, or no \.npz file"):
        load_dataset(str(file))


@pytest.mark.parametrize(
    ("content", "method"),
    [(b"no array", 0), (b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', (", 0), (b"", 99)],
    ids=["text", "header", "compression"],
)
def test_a_damaged_part_of_an_npz_is_an_error(tmp_path, content, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
    whole = (tmp_path / "a.npz").read_bytes()
    at = whole.index(b"PK\x01\x02") + 10  # where the directory says how the part is compressed
    (tmp_path / "a.npz").write_bytes(whole[:at] + bytes([method]) + whole[at + 1 :])
    with pytest.raises(BitscapeError, match=r"a\.npz: damaged, or no \.npz file"):
        load_dataset(str(tmp_path / "a.npz"))


def test_a_single_array_is_no_npz(tmp_path):
    with (tmp_path / "a.npz").open("wb") as stream:
        np.save(stream, np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(BitscapeError, match=r"damaged, or no \.npz file"):
        load_dataset(str(tmp_path / "a.npz"))


# parquet


def test_parquet_gives_images_labels_and_names(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(7), png(9)], [1, 0], ["cat", "dog"])
    data = load_dataset(path)
    assert (data.name, values(data), data.labels.tolist(), data.class_names) == ("a", [7, 9], [1, 0], ("cat", "dog"))


def test_parquet_without_labels_or_with_plain_bytes(tmp_path):
    pq.write_table(pa.table({"img": pa.array([png(3)])}), tmp_path / "a.parquet")
    data = load_dataset(str(tmp_path / "a.parquet"))
    assert (values(data), data.labels, data.class_names) == ([3], None, ())


def test_a_path_in_a_parquet_file_is_never_opened(tmp_path):
    (tmp_path / "0.png").write_bytes(png(5))
    table = pa.table({"image": pa.array([{"bytes": None, "path": str(tmp_path / "0.png")}])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BitscapeError, match="more than a tenth of its 1 images cannot be read"):
        load_dataset(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0], r"'label' holds 0\.0 in row 0; labels must be integers"),
        (["cat", "dog"], "holds 'cat' in row 0"),
        ([0, None], "holds None in row 1"),
        ([0, -1], r"a\.parquet: column 'label' holds -1 in row 1; labels must be integers from 0 to 999999"),
        ([0, 2**40], r"a\.parquet: column 'label' holds 1099511627776 in row 1; labels must be integers from 0 to 999999"),
        ([0, 2], "labels run from 0 to 2; 2 class names"),
    ],
)
def test_bad_labels_in_parquet_are_errors(tmp_path, labels, message):
    path = write_parquet(tmp_path / "a.parquet", [png(7), png(9)], labels, ["cat", "dog"])
    with pytest.raises(BitscapeError, match=message):
        load_dataset(path)


def test_names_of_another_kind_in_the_metadata_are_ignored(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(7), png(9)], [0, 1], [1, 2])
    assert load_dataset(path).class_names == ("0", "1")


def test_labels_without_names_that_are_no_classes_name_the_file(tmp_path):
    pq.write_table(pa.table({"image": [png(1)], "label": [2**40]}), tmp_path / "a.parquet")
    with pytest.raises(BitscapeError, match=r"a\.parquet: column 'label' holds 1099511627776 in row 0"):
        load_dataset(str(tmp_path / "a.parquet"))


def test_fewer_labels_than_images_are_damage(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [png(1), png(2)], [0, 1])
    whole = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda *args, **settings: whole(*args, **settings).slice(0, 1))
    with pytest.raises(BitscapeError, match=r"a\.parquet: damaged: 1 labels for 2 images"):
        load_dataset(path)


def test_a_missing_image_column_is_an_error(tmp_path):
    with pytest.raises(BitscapeError, match="no image column among images, label; nearest: images"):
        load_dataset(write_parquet(tmp_path / "a.parquet", [png(1)], [0], column="images"))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_parquet_is_an_error(twenty, tmp_path, part):
    content = (tmp_path / "twenty.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: int(part * len(content))])
    with pytest.raises(BitscapeError, match=r"cut\.parquet: damaged, or no parquet file"):
        load_dataset(str(tmp_path / "cut.parquet"))


def test_without_pyarrow_the_extra_is_named(twenty, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BitscapeError, match=r"reading twenty\.parquet needs pyarrow: pip install 'bitscape\[data\]'"):
        load_dataset(twenty)


def test_the_second_load_decodes_nothing(twenty, cache, monkeypatch):
    first = load_dataset(twenty)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(sources, "decode_images", None)
    for limit in (None, 7):
        again = load_dataset(twenty, limit=limit, seed=1)
        expected = first if limit is None else first.subset(torch.tensor(values(again)))
        assert torch.equal(again.images, expected.images)
        assert torch.equal(again.labels, expected.labels)


def test_with_and_without_cache_a_limit_gives_the_same(twenty, cache):
    before = load_dataset(twenty, limit=7)
    assert list(cache.iterdir()) == []
    load_dataset(twenty)
    assert values(load_dataset(twenty, limit=7)) == values(before)


def test_a_changed_file_is_decoded_again(twenty, tmp_path):
    load_dataset(twenty)
    write_parquet(tmp_path / "twenty.parquet", [png(100), png(101)], [0, 1])
    assert values(load_dataset(twenty)) == [100, 101]


def test_a_limit_decodes_only_its_rows(twenty, monkeypatch):
    seen = []
    decode = sources.decode_images
    monkeypatch.setattr(sources, "decode_images", lambda encoded, **settings: seen.extend(encoded) or decode(encoded, **settings))
    assert len(load_dataset(twenty, limit=3)) == 3
    assert len(seen) == 3


def test_broken_rows_are_skipped_with_their_labels_and_not_cached(tmp_path, caplog, cache):
    cells = [b"broken" if row == 1 else png(row) for row in range(12)]
    path = write_parquet(tmp_path / "a.parquet", cells, list(range(12)))
    with caplog.at_level(logging.WARNING, "bitscape.data"):
        data = load_dataset(path)
    assert values(data) == data.labels.tolist() == [0, *range(2, 12)]
    assert len(data.class_names) == 12
    assert "skipped 1 of 12 images, unreadable: 1.png" in caplog.text
    assert list(cache.iterdir()) == []


# limit and size, for every source


@pytest.fixture
def every_source(twenty, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.arange(20, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2))
    (tmp_path / "flat").mkdir()
    for value in range(20):
        (tmp_path / "flat" / f"{value:02}.png").write_bytes(png(value))
    return [twenty, str(tmp_path / "a.npz"), str(tmp_path / "flat"), "digits"]


def test_a_smaller_limit_is_a_prefix(every_source):
    for source in every_source:
        ten, five = load_dataset(source, limit=10, seed=4), load_dataset(source, limit=5, seed=4)
        assert len(ten) == 10
        assert torch.equal(ten.images[:5], five.images)
        assert not torch.equal(load_dataset(source, limit=10, seed=5).images, ten.images)
        assert torch.equal(load_dataset(source, limit=10, seed=4).images, ten.images)


def test_a_large_limit_gives_everything(every_source):
    for source in every_source[:3]:
        assert sorted(values(load_dataset(source, limit=1000))) == list(range(20))


def test_size_resizes_every_source(every_source):
    for source in every_source:
        assert load_dataset(source, size=3, limit=4).images.shape[2:] == (3, 3)


@pytest.mark.parametrize("fields", [{"size": 0}, {"limit": 0}, {"limit": -1}, {"size": 2.5}, {"limit": True}])
def test_bad_numbers_are_errors(fields):
    with pytest.raises(BitscapeError, match=rf"{next(iter(fields))}( is|=).* whole number"):
        load_dataset("digits", **fields)


# folders


@pytest.fixture
def folders(tmp_path):
    for name in ("dog", "cat", ".hidden"):
        (tmp_path / "pets" / name / "deep").mkdir(parents=True)
    (tmp_path / "pets" / "dog" / "1.PNG").write_bytes(png(1))
    (tmp_path / "pets" / "cat" / "2.png").write_bytes(png(2))
    (tmp_path / "pets" / "cat" / "deep" / "3.png").write_bytes(png(3))
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / ".hidden" / "4.png").write_bytes(png(4))
    return tmp_path / "pets"


def test_class_folders(folders):
    data = load_dataset(str(folders))
    assert (data.name, data.class_names) == ("pets", ("cat", "dog"))
    assert (values(data), data.labels.tolist()) == ([2, 3, 1], [0, 0, 1])


def test_a_flat_folder_has_no_labels(folders):
    data = load_dataset(str(folders / "cat" / "deep"))
    assert (values(data), data.labels, data.class_names) == ([3], None, ())


def test_split_folders(folders, tmp_path):
    folders.rename(tmp_path / "test")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "5.png").write_bytes(png(5))
    assert values(load_dataset(str(tmp_path))) == [5]
    assert values(load_dataset(str(tmp_path), split="test")) == [2, 3, 1]
    with pytest.raises(BitscapeError, match="no split 'tests'; nearest: test; there are test, train"):
        load_dataset(str(tmp_path), split="tests")


def test_class_folders_that_are_no_splits_stay_classes(folders):
    (folders / "train").mkdir()
    (folders / "train" / "6.png").write_bytes(png(6))
    assert load_dataset(str(folders)).class_names == ("cat", "dog", "train")


def test_a_broken_file_in_a_folder_is_skipped(folders, caplog):
    (folders / "cat" / "0.png").write_bytes(png(0)[:40])
    for value in range(10, 20):
        (folders / "dog" / f"{value}.png").write_bytes(png(value))
    data = load_dataset(str(folders))
    assert (values(data), data.labels.tolist()) == ([2, 3, 1, *range(10, 20)], [0, 0, *[1] * 11])
    assert "skipped 1 of 14" in caplog.text
    assert "0.png" in caplog.text


def test_images_beside_class_folders_are_an_error(folders):
    (folders / "9.png").write_bytes(png(9))
    with pytest.raises(BitscapeError, match="both images and folders of images"):
        load_dataset(str(folders))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(BitscapeError, match=r"no images in it; looked for \.bmp"):
        load_dataset(str(tmp_path))


def test_images_of_several_sizes_ask_for_size(folders):
    (folders / "cat" / "7.png").write_bytes(png(7, 5, 6))
    with pytest.raises(BitscapeError, match=r"differ in size .* give size="):
        load_dataset(str(folders))
    assert load_dataset(str(folders), size=4).images.shape == (4, 3, 4, 4)


# names that lead nowhere


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "cifar10_train.parquet").write_text("")
    with pytest.raises(BitscapeError, match=r"not there; nearest: cifar10_train\.parquet"):
        load_dataset(str(tmp_path / "cifar_train.parquet"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "not there; nearest: digits"),
        ("nowhere/at/all.npz", "no folder 'nowhere/at'"),
        ("hub:cifar10", "no library 'hub'; allowed is hf:name"),
        ("hff:cifar10", "no library 'hff'; nearest: hf; allowed"),
        ("hf:", "source 'hf:' names no data set; write hf:name"),
        ("", "source '' is not there; allowed are digits"),
    ],
)
def test_unknown_sources_are_errors(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BitscapeError, match=message):
        load_dataset(source)


def test_another_kind_of_file_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(BitscapeError, match=r"has the suffix '\.csv'; allowed are \.parquet, \.npz"):
        load_dataset(str(tmp_path / "a.csv"))


# the hub, through a stand-in for the datasets library


class Table:
    """The part of `datasets.Dataset` that is used."""

    def __init__(self, rows, names):
        self.rows = rows
        self.column_names = list(rows[0])
        self.features = {name: SimpleNamespace(names=names) if name == "label" else None for name in self.column_names}

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, name):
        return [row[name] for row in self.rows]

    def cast_column(self, name, feature):
        assert (name, feature) == ("image", "undecoded")
        return self

    def select_columns(self, names):
        return Table([{name: row[name] for name in names} for row in self.rows], [])

    def select(self, numbers):
        return Table([self.rows[number] for number in numbers], [])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    (tmp_path / "6.png").write_bytes(png(6))
    rows = [
        {"image": {"bytes": png(5), "path": None}, "label": 1},
        {"image": None, "label": 0},
        {"image": {"bytes": None, "path": None}, "label": 0},
        {"image": {"bytes": None, "path": str(tmp_path / "6.png")}, "label": 0},
        *[{"image": {"bytes": png(7), "path": None}, "label": 1}] * 16,
    ]

    def load(name, split, trust_remote_code):
        assert trust_remote_code is False
        if split != "train":
            raise ValueError(f'Unknown split "{split}"')
        return Table(rows, ["cat", "dog"])

    config = SimpleNamespace(HF_CACHE_HOME=tmp_path)
    module = SimpleNamespace(load_dataset=load, Image=lambda decode: "decoded" if decode else "undecoded", config=config)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hub(hub, caplog):
    data = load_dataset("hf:some/pets")
    assert (data.name, values(data), data.labels.tolist()) == ("some/pets", [5, 6, *[7] * 16], [1, 0, *[1] * 16])
    assert data.class_names == ("cat", "dog")
    assert "skipped 2 of 20 images, unreadable: row 1" in caplog.text


def test_what_the_hub_refuses_is_passed_on(hub):
    with pytest.raises(BitscapeError, match=r"hf:some/pets, split 'no': .* Unknown split"):
        load_dataset("hf:some/pets", split="no")


def test_without_the_datasets_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BitscapeError, match=r"hf:pets needs datasets: pip install 'bitscape\[huggingface\]'"):
        load_dataset("hf:pets")


# real data


def test_cifar10(shared_data):
    data = load_dataset(str(shared_data / "cifar10_test.parquet"), limit=500)
    assert data.images.shape == (500, 3, 32, 32)
    assert data.class_names[0] == "airplane"
    assert data.labels.bincount().min() > 20


def test_real_images_of_several_sizes(shared_data):
    path = str(shared_data / "pets37_sample_test.parquet")
    with pytest.raises(BitscapeError, match="give size="):
        load_dataset(path)
    data = load_dataset(path, size=64)
    assert data.images.shape == (111, 3, 64, 64)
    assert data.labels.bincount().tolist() == [3] * 37


def test_real_greyscale_images_become_rgb(shared_data):
    data = load_dataset(str(shared_data / "tiny_imagenet_val4k.parquet"), limit=600)
    assert data.images.shape == (600, 3, 64, 64)
    grey = (data.images[:, 0] == data.images[:, 1]).all(-1).all(-1)
    assert 0 < grey.sum() < 60


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.int64(3)}, r"labels have shape \(\); allowed is one axis"),
        ({"labels": np.zeros((2, 1), np.int64)}, r"labels have shape \(2, 1\); allowed is one axis"),
        ({"labels": np.array([0, 1]), "class_names": np.array("cat")}, r"class_names have shape \(\)"),
        ({"images": np.uint8(3)}, r"images have shape \(\)"),
        ({"labels": np.array([0, 2**63], np.uint64)}, "labels run from -9223372036854775808"),
    ],
)
def test_an_npz_of_other_axes_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **{"images": np.zeros((2, 8, 8), np.uint8), **arrays})
    with pytest.raises(BitscapeError, match=rf"a\.npz: {message}|a: {message}"):
        load_dataset(str(tmp_path / "a.npz"))


def test_of_an_npz_only_what_is_used_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=np.full((2, 8, 8), 7, np.uint8), other=np.zeros(2**22))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    at = content.rindex(b"other.npy", 0, content.index(b"PK\x01\x02"))
    content[at + 40 : at + 60] = bytes(20)  # its data are damaged
    (tmp_path / "a.npz").write_bytes(content)
    assert load_dataset(str(tmp_path / "a.npz")).images.unique().tolist() == [7]


def test_what_an_array_unpacks_to_is_checked_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.NPZ_BYTES, "class_names", 1000)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.array([0]), class_names=np.array(["x" * 1000]))
    with pytest.raises(BitscapeError, match=r"a\.npz: .*class_names\.npy unpacks to 4,\d+ bytes; allowed are 1,000"):
        load_dataset(str(tmp_path / "a.npz"))


def test_a_parquet_label_beyond_64_bits_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [png(1)], "label": pa.array([2**63], pa.uint64())}), tmp_path / "a.parquet")
    with pytest.raises(BitscapeError, match=r"a\.parquet: column 'label' holds 9223372036854775808 in row 0; labels must be"):
        load_dataset(str(tmp_path / "a.parquet"))


def test_a_parquet_file_of_too_many_rows_is_refused(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [png(1)] * 3, [0] * 3)
    monkeypatch.setattr(encoded, "MAX_ROWS", 2)
    with pytest.raises(BitscapeError, match=r"a\.parquet: 3 rows; allowed are 2 in one file"):
        load_dataset(path)


def test_rows_of_a_parquet_file_come_in_any_order_from_groups_of_any_size():
    ends, opened = [5, 40, 41], []

    def read(group):
        opened.append(group)
        rows = range(ends[group - 1] if group else 0, ends[group])
        return iter([pa.array(rows[at : at + 16]) for at in range(0, len(rows), 16)])

    groups = encoded._RowGroups(read, ends)
    assert groups.cells([40, 3, 3, 39, 0, 5]) == [40, 3, 3, 39, 0, 5] and opened == [0, 1, 2]
    assert groups.cells([6, 7]) == [6, 7] and groups.cells([8, 38]) == [8, 38] and opened == [0, 1, 2, 1]
    with pytest.raises(IndexError, match="group 3 ends before row 41"):
        encoded._RowGroups(lambda group: iter(()), ends).cells([41])


def test_a_dataset_prints_how_many_images_its_classes_have():
    named = Dataset("<mine>", images(4), torch.tensor([0, 2, 2, 2]), ("cat", "dog", "ship"))
    lines = [line.split() for line in repr(named).splitlines()]
    assert " ".join(lines[0]) == "Dataset <mine>: 4 images of 1x3x3, 3 classes"
    assert lines[1:] == [["class", "images"], ["cat", "1"], ["dog", "0"], ["ship", "3"]]
    assert named._repr_html_().startswith("<table><caption>Dataset &lt;mine&gt;: 4 images")
    many = Dataset("many", images(2), torch.tensor([0, 999]), tuple(map(str, range(1000))))
    assert len(repr(many).splitlines()) == 10
    assert repr(Dataset("bare", images(1))) == "Dataset bare: 1 image of 1x3x3, no labels"
