import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from bitscape.data.decoding import EncodedImage, decode_images
from bitscape.data.sources import Dataset
from bitscape.errors import BitscapeError


def encode(pixels, name="a.png", kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(stream, kind)
    return EncodedImage(name, stream.getvalue())


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), np.uint8)


def test_pixels_come_back_as_stored(noise):
    images, kept = decode_images([encode(pixels) for pixels in noise], size=None, source="here")
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), noise.transpose(0, 3, 1, 2))
    assert kept.tolist() == list(range(6))


def test_more_images_than_one_chunk_keep_their_order():
    encoded = [encode(np.full((1, 1, 3), number % 256, np.uint8)) for number in range(1100)]
    images, _ = decode_images(encoded, size=None, source="here")
    assert images[:, 0, 0, 0].tolist() == [number % 256 for number in range(1100)]


def test_grey_becomes_rgb(noise):
    images, _ = decode_images([encode(noise[0, :, :, 0])], size=None, source="here")
    assert images.shape == (1, 3, 10, 12)
    assert (images == torch.from_numpy(noise[0, :, :, 0])).all()


def test_broken_images_are_skipped_and_logged(noise, caplog):
    good = encode(noise[0])
    cut = EncodedImage("cut.png", good.content[:60])
    no_image = EncodedImage("text.png", b"hello")
    deep = encode(np.full((10, 12), 40_000, np.uint16), "deep.png")
    with caplog.at_level(logging.WARNING, "bitscape.data"):
        images, kept = decode_images([cut, good, no_image, deep, good], size=None, source="here")
    assert len(images) == 2
    assert kept.tolist() == [1, 4]
    assert "here: skipped 3 of 5" in caplog.text
    assert all(name in caplog.text for name in ("cut.png", "text.png", "deep.png", "more than 8 bits"))


def test_a_long_list_of_broken_images_is_shortened(noise, caplog):
    broken = [EncodedImage(f"{number}.png", b"") for number in range(7)]
    decode_images([encode(noise[0]), *broken], size=None, source="here")
    assert "and 2 more" in caplog.text
    assert "6.png" not in caplog.text


def test_only_broken_images_are_an_error():
    with pytest.raises(BitscapeError, match=r"none of its 2 images can be read; the first: a\.png"):
        decode_images([EncodedImage("a.png", b"x")] * 2, size=None, source="here")


def test_no_images_are_an_error():
    with pytest.raises(BitscapeError, match="none of its 0 images"):
        decode_images([], size=None, source="here")


def test_a_missing_file_counts_as_broken(noise, tmp_path):
    _, kept = decode_images([EncodedImage("gone", tmp_path / "gone.png"), encode(noise[0])], size=None, source="here")
    assert kept.tolist() == [1]


def test_sizes_that_differ_ask_for_size(noise):
    encoded = [encode(noise[0], "wide.png"), encode(noise[1].transpose(1, 0, 2), "tall.png")]
    with pytest.raises(BitscapeError, match=r"wide\.png is 10x12 and tall\.png is 12x10 pixels.*give size="):
        decode_images(encoded, size=None, source="here")
    images, _ = decode_images(encoded, size=7, source="here")
    assert images.shape == (2, 3, 7, 7)


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (30, 30), (20, 33)])
@pytest.mark.parametrize("size", [16, 20, 45])
def test_resizing_while_decoding_agrees_with_resizing_the_dataset(shape, size):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack([rows * 3, columns * 3, rows + columns], -1).astype(np.uint8)
    decoded, _ = decode_images([encode(smooth)], size=size, source="here")
    tensor = Dataset("here", torch.from_numpy(smooth.transpose(2, 0, 1).copy())[None]).resized(size).images
    assert decoded.shape == tensor.shape == (1, 3, size, size)
    assert (decoded.int() - tensor.int()).abs().max() <= 1
