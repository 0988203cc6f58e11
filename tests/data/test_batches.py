import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from bitscape.data.batches import CIFAR10, DIGITS, IMAGENET, UNIT, Batches, Normalization
from bitscape.data.sources import Dataset, load_dataset
from bitscape.errors import BitscapeError

ONE = Normalization((0.0,), (1 / 255,))  # pixels come out as they went in


def dataset(count, height=6, width=5):
    """Every pixel of image i, and its label, is i + 1."""
    images = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, height, width)
    return Dataset("here", images.contiguous(), torch.arange(1, count + 1), tuple(map(str, range(count + 1))))


def noise(count=64, channels=1, height=6, width=5):
    images = torch.randint(1, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(0))
    return Dataset("noise", images.to(torch.uint8))


def equal(one, other):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


settings_of_batches = st.fixed_dictionaries(
    {
        "dataset": st.integers(1, 40).map(dataset),
        "batch_size": st.integers(1, 12),
        "shuffle": st.booleans(),
        "augment": st.sampled_from(["none", "flip", "crop-flip"]),
        "seed": st.integers(0, 2**40),
    }
)


@given(settings_of_batches, st.integers(0, 1000), st.data())
def test_resuming_anywhere_gives_the_same_batches(fields, epoch, data):
    batches = Batches(normalization=ONE, **fields)
    whole = list(batches.epoch(epoch))
    start = data.draw(st.integers(0, len(batches)))
    assert len(whole) == len(batches)
    assert equal(batches.epoch(epoch, start=start), whole[start:])


@given(settings_of_batches, st.integers(0, 1000), st.integers(1, 5), st.data())
def test_rows_of_a_batch_are_the_same_bits_as_in_the_whole(fields, epoch, workers, data):
    batches = Batches(normalization=ONE, **fields)
    rows = slice(data.draw(st.integers(0, workers - 1)), None, workers)
    whole = ((images[rows], labels[rows]) for images, labels in batches.epoch(epoch))
    assert equal(batches.epoch(epoch, rows=rows), whole)


@given(settings_of_batches, st.integers(0, 1000))
def test_batches_depend_on_nothing_else(fields, epoch):
    batches = Batches(normalization=ONE, **fields)
    expected = list(batches.epoch(epoch))
    torch.manual_seed(epoch)
    list(batches.epoch(epoch + 1))
    torch.rand(3)
    assert equal(Batches(normalization=ONE, **fields).epoch(epoch), expected)


@given(settings_of_batches, st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_labels_follow_their_images(fields, epoch):
    seen = []
    for images, labels in Batches(normalization=ONE, **fields).epoch(epoch):
        assert torch.equal(images.amax((1, 2, 3)).round().long(), labels)
        seen += labels.tolist()
    assert sorted(seen) == fields["dataset"].labels.tolist()
    if not fields["shuffle"]:
        assert seen == sorted(seen)


@given(st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_length_is_the_number_of_batches(count, size, drop_last):
    if drop_last and size > count:
        with pytest.raises(BitscapeError, match="drop_last leaves no batch"):
            Batches(dataset=dataset(count), normalization=ONE, batch_size=size, drop_last=True)
        return
    batches = Batches(dataset=dataset(count), normalization=ONE, batch_size=size, drop_last=drop_last)
    sizes = [len(images) for images, _ in batches.epoch(0)]
    joined = not drop_last and 1 < size < count and count % size == 1
    assert len(batches) == len(sizes) == (count // size if drop_last or joined else -(-count // size))
    assert set(sizes[:-1]) <= {size}
    assert sum(sizes) == (count - count % size if drop_last else count)


def test_epochs_seeds_and_batches_differ():
    batches = Batches(dataset=dataset(100), normalization=ONE, shuffle=True, batch_size=100)
    orders = {tuple(next(batches.epoch(epoch))[1].tolist()) for epoch in range(5)}
    other = Batches(dataset=dataset(100), normalization=ONE, shuffle=True, batch_size=100, seed=1)
    orders.add(tuple(next(other.epoch(0))[1].tolist()))
    assert len(orders) == 6


def test_batches_of_one_epoch_are_augmented_differently():
    same = Dataset("same", noise(1).images.repeat(64, 1, 1, 1))
    first, second = (images for images, _ in Batches(dataset=same, normalization=ONE, batch_size=32, augment="crop-flip").epoch(0))
    assert not torch.equal(first, second)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(Batches(dataset=dataset(9), normalization=ONE, shuffle=True, augment="crop-flip").epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_labels_there_are_none():
    ((_, labels),) = Batches(dataset=noise(), normalization=ONE).epoch(0)
    assert labels is None


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_flip_gives_each_image_or_its_mirror_image(seed, channels):
    data = noise(channels=channels)
    normalization = Normalization((0.0,) * channels, (1 / 255,) * channels)
    ((images, _),) = Batches(dataset=data, normalization=normalization, augment="flip", seed=seed).epoch(0)
    same = (images.round() == data.images).all((1, 2, 3))
    mirrored = (images.round() == data.images.flip(-1)).all((1, 2, 3))
    assert (same | mirrored).all()
    assert 10 < mirrored.sum() < 54  # of 64 fair coins


def windows(image):
    """Every result that crop-flip may give: 81 shifts of the image and of its mirror image, filled with zeros."""
    _, height, width = image.shape
    for kind in (image, image.flip(-1)):
        framed = torch.zeros(image.shape[0], height + 8, width + 8)
        framed[:, 4:-4, 4:-4] = kind
        for top in range(9):
            for left in range(9):
                yield framed[:, top : top + height, left : left + width]


def test_crop_flip_gives_a_shifted_image():
    data = noise(32, channels=2)
    normalization = Normalization((0.3, 0.6), (0.2, 0.4))
    ((images, _),) = Batches(dataset=data, normalization=normalization, augment="crop-flip").epoch(0)
    for image, original in zip(images, normalization.apply(data.images), strict=True):
        assert any(torch.equal(image, window) for window in windows(original))


def test_every_shift_occurs_equally_often():
    image = noise(1, height=9, width=9)
    many = Dataset("many", image.images.repeat(8100, 1, 1, 1))
    ((images, _),) = Batches(dataset=many, normalization=ONE, batch_size=8100, augment="crop-flip").epoch(0)
    counts = [int((images == window).all((1, 2, 3)).sum()) for window in windows(ONE.apply(image.images)[0])]
    assert sum(counts) == 8100
    assert min(counts) > 20 and max(counts) < 90  # mean 50, standard deviation 7


@pytest.mark.parametrize("normalization", [IMAGENET, CIFAR10, UNIT])
def test_normalization_is_the_formula(normalization):
    images = noise(channels=3).images
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (normalization.mean, normalization.std))
    result = normalization.apply(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), (images.double() / 255 - mean) / std, rtol=0, atol=2e-6)


def test_unit_and_digits_span_0_to_1():
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    torch.testing.assert_close(DIGITS.apply(ends).flatten(), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(UNIT.apply(ends.expand(2, 3, 1, 1)).amax(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((), (), "one value for each channel"),
        ((0.0,), (1.0, 1.0), "one value for each channel"),
        ((0.0,), (0.0,), "std .* positive"),
        ((0.0,), (float("nan"),), "std .* positive"),
        ((float("inf"),), (1.0,), "must be finite"),
    ],
)
def test_bad_normalizations_are_errors(mean, std, message):
    with pytest.raises(BitscapeError, match=message):
        Normalization(mean, std)


def test_float_images_are_not_normalized_again():
    with pytest.raises(BitscapeError, match="must be uint8"):
        DIGITS.apply(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalization": CIFAR10}, "images have 1 channels, the normalization has 3"),
        ({"augment": "flips"}, "augment is 'flips'; allowed are none, flip, crop-flip; nearest: flip"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size=2.0: it must be a whole number"),
    ],
)
def test_bad_settings_are_errors(fields, message):
    with pytest.raises(BitscapeError, match=message):
        Batches(**{"dataset": dataset(4), "normalization": ONE, **fields})


@pytest.mark.parametrize(("number", "start"), [(-1, 0), (0, -1), (0, 3)])
def test_epochs_out_of_range_are_errors_at_the_call(number, start):
    batches = Batches(dataset=dataset(4), normalization=ONE, batch_size=2)
    with pytest.raises(BitscapeError, match="starts 0 to 2"):
        batches.epoch(number, start=start)


class Counted(TorchFunctionMode):
    """Counts the calls of torch's functions."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_augmenting_takes_as_many_operators_for_many_images_as_for_few():
    counts = []
    for size in (4, 64):
        data = noise(size, channels=3, height=32, width=32)
        batches = Batches(dataset=data, normalization=CIFAR10, batch_size=size, augment="crop-flip")
        with Counted() as counted:
            assert len(list(batches.epoch(0))) == 1
        counts.append(counted.calls)
    assert counts[0] == counts[1] > 0


def test_real_images_have_the_published_statistics(shared_data):
    data = load_dataset(str(shared_data / "cifar10_test.parquet"), limit=2000)
    images = torch.cat([images for images, _ in Batches(dataset=data, normalization=CIFAR10).epoch(0)])
    assert images.mean((0, 2, 3)).abs().max() < 0.05
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_a_single_last_image_joins_the_batch_before_unless_it_is_dropped():
    fields = {"dataset": dataset(9), "normalization": ONE, "batch_size": 4, "shuffle": True, "augment": "crop-flip"}
    batches = Batches(**fields)
    sizes = [len(labels) for _, labels in batches.epoch(0)]
    assert (len(batches), sizes) == (2, [4, 5])
    assert sorted(label for _, labels in batches.epoch(0) for label in labels.tolist()) == list(range(1, 10))
    assert [len(labels) for _, labels in Batches(**fields, drop_last=True).epoch(0)] == [4, 4]
    assert [len(labels) for _, labels in Batches(**fields, fewest=1).epoch(0)] == [4, 4, 1]


def test_batches_print_their_data_set_and_settings():
    batches = Batches(dataset=load_dataset("digits", limit=10), normalization=DIGITS, batch_size=4)
    lines = [line.split() for line in repr(batches).splitlines()]
    assert " ".join(lines[0]) == "Batches: 3 an epoch of Dataset digits train: 10 images of 1x8x8, 10 classes"
    assert lines[1:4] == [["setting", "value"], ["normalization", "Normalization(mean=(0.0,),", "std=(1.0,))"], ["batch_size", "4"]]
    assert len(lines) <= 12
