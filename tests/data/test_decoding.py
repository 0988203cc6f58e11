import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from bitscape.data.decoding import BAD_START, FORMATS, EncodedImage, decode_images, image_shape
from bitscape.data.encoded import IMAGE_SUFFIXES
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
    deep = encode(np.full((10, 12), 0.5, np.float32), "deep.tif", "TIFF")
    with caplog.at_level(logging.WARNING, "bitscape.data"):
        images, kept = decode_images([cut, good, no_image, deep, *[good] * 26], size=None, source="here")
    assert len(images) == 27
    assert kept.tolist() == [1, *range(4, 30)]
    assert "here: skipped 3 of 30" in caplog.text
    assert all(name in caplog.text for name in ("cut.png", "text.png", "deep.tif", "more than 8 bits"))


def test_a_long_list_of_broken_images_is_shortened(noise, caplog):
    broken = [EncodedImage(f"{number}.png", b"") for number in range(7)]
    decode_images([*[encode(noise[0])] * 63, *broken], size=None, source="here")
    assert "and 2 more" in caplog.text
    assert "6.png" not in caplog.text


def test_more_than_a_tenth_broken_is_an_error_at_once(noise):
    good, broken = encode(noise[0]), EncodedImage("b.png", b"x")
    assert len(decode_images([broken, *[good] * 9], size=None, source="here")[0]) == 9

    class Rows(list):
        def __getitem__(self, index):
            assert index.start == 0  # the second chunk is not asked for
            return [broken] * (index.stop - index.start)

    message = r"here: more than a tenth of its 1500 images cannot be read: b\.png \(cannot identify image file\), .* and 146 more"
    with pytest.raises(BitscapeError, match=message):
        decode_images(Rows([None] * 1500), size=None, source="here")


def test_no_images_are_an_error():
    with pytest.raises(BitscapeError, match="here: there are no images in it"):
        decode_images([], size=None, source="here")


def test_a_missing_file_counts_as_broken(noise, tmp_path):
    _, kept = decode_images([EncodedImage("gone", tmp_path / "gone.png"), *[encode(noise[0])] * 9], size=None, source="here")
    assert kept.tolist() == list(range(1, 10))


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


def saved(picture, kind, **settings):
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return EncodedImage(f"a.{kind.lower()}", stream.getvalue())


def only(encoded, size=None):
    return decode_images([encoded], size=size, source="here")[0][0]


def test_sixteen_bits_are_cut_to_their_high_byte_and_counted(caplog):
    grey = np.array([[0, 255, 256], [40_000, 65_279, 65_535]], np.uint16)
    with caplog.at_level(logging.INFO, "bitscape.data"):
        for encoded in (encode(grey), encode(grey, kind="TIFF"), EncodedImage("a.pgm", b"P5 3 2 65535 " + grey.astype(">u2").tobytes())):
            assert torch.equal(only(encoded), torch.tensor([[0, 0, 1], [156, 254, 255]], dtype=torch.uint8).expand(3, 2, 3))
    assert "here: converted 1 of 1 images: a.pgm (16 bits to 8)" in caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_photos_are_turned_upright_and_counted(noise, orientation, kind, caplog):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    encoded = saved(Image.fromarray(noise[0]), kind, exif=exif, **lossless)
    with caplog.at_level(logging.INFO, "bitscape.data"):
        pixels = only(encoded)
    # EXIF 2.32: where row 0 and column 0 of what is stored lie in the scene
    mirror_rows, mirror_columns, swapped = ORIENTATIONS[orientation]
    scene = noise[0][:: -1 if mirror_rows else 1, :: -1 if mirror_columns else 1]
    assert np.array_equal(pixels.numpy(), (scene.transpose(1, 0, 2) if swapped else scene).transpose(2, 0, 1))
    assert ("turned upright" in caplog.text) == (orientation > 1 and kind != "TIFF")  # Pillow turns TIFF itself


# orientation: row 0 is at the bottom (or, swapped, at the right), column 0 at the right (or bottom), rows are columns
ORIENTATIONS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}


def test_other_kinds_of_images_become_rgb(noise):
    picture = Image.fromarray(noise[0])
    palette = picture.quantize(16)
    wanted = torch.from_numpy(np.asarray(palette.convert("RGB")).transpose(2, 0, 1).copy())
    assert torch.equal(only(saved(palette, "PNG")), wanted)
    assert torch.equal(only(saved(palette, "PNG", transparency=bytes(range(16)))), wanted)
    white = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    assert only(saved(white, "TIFF")).min() == 255
    black = Image.new("1", (4, 4), 0)
    assert only(saved(black, "PNG")).max() == 0
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    assert torch.equal(only(saved(clear, "PNG")), only(saved(picture, "PNG")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_picture_counts(kind):
    pictures = [Image.new("RGB", (4, 4), (value, value, value)) for value in (0, 255)]
    assert only(saved(pictures[0], kind, save_all=True, append_images=pictures[1:])).max() < 10


def test_one_pixel_fills_the_square_and_one_line_is_no_gigabyte():
    assert torch.equal(only(encode(np.full((1, 1, 3), 7, np.uint8)), 32), torch.full((3, 32, 32), 7, dtype=torch.uint8))
    line = encode(np.zeros((1, 60_000), np.uint8), "line.png")
    with pytest.raises(BitscapeError, match=r"line\.png \(13440000x224 pixels are more than 89,478,485\)"):
        decode_images([line], size=224, source="here")


def test_any_failure_of_a_reader_is_a_broken_image(noise, monkeypatch):
    def fail(content, formats):
        raise ZeroDivisionError("width")

    monkeypatch.setattr("PIL.Image.open", fail)
    with pytest.raises(BitscapeError, match=r"a\.png \(width\)"):
        decode_images([encode(noise[0])], size=None, source="here")


def test_the_shape_is_that_of_the_first_readable_image(noise):
    encoded = [EncodedImage("a", b"x"), encode(noise[0])]
    assert image_shape(encoded, None) == (3, 10, 12)
    assert image_shape(encoded, 7) == (3, 7, 7)
    assert image_shape(encoded[:1], None) is None


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nnewpath 0 0 moveto 8 8 lineto stroke showpage\n%%EOF\n"


@pytest.mark.parametrize("as_file", [True, False])
def test_postscript_starts_no_program_whatever_it_is_called(noise, tmp_path, monkeypatch, as_file):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **settings: started.append(arguments))
    (tmp_path / "a.png").write_bytes(EPS)
    content = tmp_path / "a.png" if as_file else EPS
    _, kept = decode_images([encode(noise[0])] * 10 + [EncodedImage("a.png", content)], size=None, source="here")
    assert kept.tolist() == list(range(10)) and started == []


def test_every_suffix_that_is_taken_for_an_image_is_of_a_format_that_is_read():
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in IMAGE_SUFFIXES} <= set(FORMATS)


def test_a_start_that_is_mostly_broken_ends_the_decoding(noise):
    encoded = [EncodedImage(f"{row}.png", b"no image") for row in range(3 * BAD_START)] + [encode(noise[0])] * 100_000
    with pytest.raises(BitscapeError, match=r"here: 1001 of the first 1001 images cannot be read: 0\.png"):
        decode_images(encoded, size=None, source="here")
