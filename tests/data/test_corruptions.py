import colorsys
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import poisson

from bitscape.data import corruptions
from bitscape.data.corruptions import CORRUPTIONS, HELD_OUT, TRAINED, corrupt, corrupted, randomly_corrupted
from bitscape.data.sources import Dataset
from bitscape.errors import BitscapeError

NOISES = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"}
SEVERITIES = range(1, 6)


def by_severity(*strengths):
    return list(zip(SEVERITIES, strengths, strict=True))


def gray(value, count=30, size=32):
    return torch.full((count, 3, size, size), value, dtype=torch.uint8)


def random_images(count=6, height=12, width=9):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def drawn_images(count=8, size=32):
    """A shaded background, a disk with an edge and fine grain: something for every corruption to spoil."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    color = torch.rand(count, 3, 3, 1, 1, generator=generator)
    middle = torch.randint(8, 24, (count, 2, 1, 1), generator=generator)
    disk = ((x - middle[:, 0]) ** 2 + (y - middle[:, 1]) ** 2 < 60)[:, None]
    unit = 0.6 * color[:, 0] * x / size + 0.4 * color[:, 1] * y / size + 0.3 * color[:, 2] * disk
    unit += 0.1 * torch.rand(count, 1, size, size, generator=generator)
    return (unit * 200).to(torch.uint8)


def dataset(images):
    labels = torch.arange(len(images)) % 3
    return Dataset("here", images, labels, ("a", "b", "c"))


def unit_std(images):
    return float((images.double() / 255).std())


@pytest.mark.parametrize(("severity", "std"), by_severity(0.04, 0.06, 0.08, 0.09, 0.10))
def test_gaussian_noise_has_its_standard_deviation_and_no_bias(severity, std):
    noisy = corrupt(gray(128), "gaussian_noise", severity, seed=0)
    assert unit_std(noisy) == pytest.approx(std, rel=0.02)
    assert float(noisy.double().mean()) == pytest.approx(128, abs=0.5)


@pytest.mark.parametrize(("severity", "std"), by_severity(0.06, 0.10, 0.12, 0.16, 0.20))
def test_speckle_noise_grows_with_the_value(severity, std):
    for value in (40, 120):
        assert unit_std(corrupt(gray(value), "speckle_noise", severity, seed=0)) == pytest.approx(value / 255 * std, rel=0.02)
    assert torch.equal(corrupt(gray(0), "speckle_noise", severity, seed=0), gray(0))


@pytest.mark.parametrize(("severity", "rate"), by_severity(500, 250, 100, 75, 50))
def test_shot_noise_has_the_mean_and_variance_of_a_poisson_count(severity, rate):
    counts = np.arange(rate + 1)
    for value in (64, 128):
        noisy = corrupt(gray(value), "shot_noise", severity, seed=0)
        assert float(noisy.double().mean()) == pytest.approx(value, rel=0.01)
        # rounding to pixels takes up to 3% of the variance away: at rate 500 two counts share a pixel
        assert unit_std(noisy) ** 2 == pytest.approx(value / 255 / rate, rel=0.05)
        share, pixel = poisson.pmf(counts, value / 255 * rate), np.round(255 * counts / rate)
        variance = (share * pixel**2).sum() - (share * pixel).sum() ** 2
        assert unit_std(noisy) ** 2 == pytest.approx(variance / 255**2, rel=0.02)
    assert torch.equal(corrupt(gray(0), "shot_noise", severity, seed=0), gray(0))


def test_shot_noise_takes_whole_counts_only():
    values = corrupt(gray(128), "shot_noise", 5, seed=0).unique().tolist()
    assert set(values) <= {round(255 * count / 50) for count in range(51)}


@pytest.mark.parametrize(("severity", "amount"), by_severity(0.01, 0.02, 0.03, 0.05, 0.07))
def test_impulse_noise_is_half_salt_half_pepper_and_nothing_else(severity, amount):
    noisy = corrupt(gray(100, count=100), "impulse_noise", severity, seed=0)
    assert float((noisy == 0).double().mean()) == pytest.approx(amount / 2, rel=0.1)
    assert float((noisy == 255).double().mean()) == pytest.approx(amount / 2, rel=0.1)
    assert noisy.unique().tolist() == [0, 100, 255]


def test_more_impulse_noise_contains_the_lesser():
    noisy = [corrupt(gray(100), "impulse_noise", severity, seed=0) for severity in SEVERITIES]
    for less, more in itertools.pairwise(noisy):
        hit = less != 100
        assert torch.equal(less[hit], more[hit])


def test_channels_get_noise_of_their_own():
    deviation = corrupt(gray(128), "gaussian_noise", 5, seed=0).double().sub(128).transpose(0, 1).flatten(1)
    assert torch.corrcoef(deviation)[0, 1:].abs().max() < 0.03


@pytest.mark.parametrize(("severity", "sigma"), by_severity(0.4, 0.6, 0.7, 0.8, 1.0))
def test_gaussian_blur_agrees_with_scipy(severity, sigma):
    images = random_images()
    unrounded = gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest")
    blurred = corrupt(images, "gaussian_blur", severity, seed=0).double().numpy()
    assert np.abs(blurred - unrounded).max() < 0.501


def test_defocus_spreads_a_point_over_its_disk():
    point = gray(0, count=1, size=7)
    point[..., 3, 3] = 225
    window = {severity: corrupt(point, "defocus_blur", severity, seed=0)[0, 0, 1:6, 1:6].tolist() for severity in SEVERITIES}
    # the Gaussian alone: side taps exp(-1 / (2 * 0.4 ** 2)) = 0.04394 of the middle one, hence 0.0404, 0.9192, 0.0404
    assert window[1] == [[0, 0, 0, 0, 0], [0, 0, 8, 0, 0], [0, 8, 190, 8, 0], [0, 0, 8, 0, 0], [0, 0, 0, 0, 0]]
    # radius 1: five pixels of 225 / 5
    assert window[4] == [[0, 0, 0, 0, 0], [0, 0, 45, 0, 0], [0, 45, 45, 45, 0], [0, 0, 45, 0, 0], [0, 0, 0, 0, 0]]
    # radius 1.5 holds the corners, at distance 1.41: nine pixels of 225 / 9
    assert window[5] == [[0, 0, 0, 0, 0], [0, 25, 25, 25, 0], [0, 25, 25, 25, 0], [0, 25, 25, 25, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_keeps_the_mean_away_from_the_edge(name, severity):
    images = gray(90, count=6, size=24)
    images[..., 8:16, 8:16] = random_images(6, 8, 8)
    blurred = corrupt(images, name, severity, seed=0)
    assert (blurred.double().mean((2, 3)) - images.double().mean((2, 3))).abs().max() < 0.1
    assert not torch.equal(blurred, images)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "contrast", "pixelate"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_constant_images_stay(name, severity):
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 5, 6).contiguous()
    assert torch.equal(corrupt(every, name, severity, seed=0), every)


def one_color(*color):
    return torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("color", "severity", "expected"),
    [
        ((40, 80, 160), 1, (43, 86, 173)),  # value 160 + 12.75: all times 1.0797
        ((40, 80, 160), 3, (50, 99, 198)),  # value 160 + 38.25: all times 1.2391
        ((100, 200, 250), 5, (102, 204, 255)),  # value cut at 255: all times 1.02
        ((0, 0, 0), 1, (13, 13, 13)),  # black has no hue
    ],
)
def test_brightness_of_known_colors(color, severity, expected):
    assert torch.equal(corrupt(one_color(*color), "brightness", severity, seed=0), one_color(*expected))


@pytest.mark.parametrize(("severity", "shift"), by_severity(0.05, 0.10, 0.15, 0.20, 0.30))
def test_brightness_is_an_addition_to_the_value_of_hsv(severity, shift):
    images = random_images()
    colors = images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    hsv = [colorsys.rgb_to_hsv(*(channel / 255 for channel in color)) for color in colors]
    unrounded = torch.tensor([colorsys.hsv_to_rgb(hue, saturation, min(1, value + shift)) for hue, saturation, value in hsv]) * 255
    bright = corrupt(images, "brightness", severity, seed=0).permute(0, 2, 3, 1).reshape(-1, 3)
    assert (bright - unrounded).abs().max() < 0.501


@pytest.mark.parametrize(("severity", "factor"), by_severity(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_scales_the_deviation_from_the_mean_of_each_channel(severity, factor):
    mean = torch.tensor([[100, 140, 7], [90, 128, 200]]).view(2, 3, 1, 1)
    deviation = torch.tensor([40, 20, 0, -20, -40, 0]).view(2, 3) * torch.tensor([1, 2, 0]).view(3, 1, 1)
    low = corrupt((mean + deviation).to(torch.uint8), "contrast", severity, seed=0)
    assert torch.equal(low, (mean + factor * deviation).round().to(torch.uint8))


@pytest.mark.parametrize(("severity", "quality"), by_severity(80, 65, 58, 50, 40))
def test_jpeg_is_a_file_of_the_quality(severity, quality):
    images = drawn_images(3)
    file = io.BytesIO()
    Image.fromarray(images[2].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(corrupt(images, "jpeg", severity, seed=0)[2], expected)


@pytest.mark.parametrize(("severity", "left"), by_severity(30, 28, 27, 24, 20))
def test_pixelate_leaves_so_many_columns_and_rows(severity, left):
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(1, 3, 32, 32).contiguous()
    for images in (ramp, ramp.transpose(2, 3).contiguous()):
        assert len(corrupt(images, "pixelate", severity, seed=0).unique()) == left


def test_pixelate_averages_what_the_box_covers():
    # 4 to 3 pixels: the centers are 2/3, 2, 10/3 and the boxes 4/3 wide, so only the middle one holds two pixel centers
    row = torch.tensor([10, 100, 200, 250], dtype=torch.uint8)
    expected = torch.tensor([10, 150, 150, 250], dtype=torch.uint8)
    assert torch.equal(corrupt(row.repeat(1, 3, 4, 1), "pixelate", 4, seed=0), expected.repeat(1, 3, 4, 1))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_error_grows_with_severity(name):
    images = drawn_images()
    errors = [float((corrupt(images, name, severity, seed=0).double() - images).square().mean()) for severity in SEVERITIES]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3] < errors[4]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_depends_on_its_row_and_the_seed_alone(name, monkeypatch):
    images = random_images(7)
    before = images.clone()
    whole = corrupt(images, name, 3, seed=5)
    assert torch.equal(whole, corrupt(images, name, 3, seed=5))
    assert torch.equal(whole[4:6], corrupt(images[4:6], name, 3, seed=5, rows=torch.tensor([4, 5])))
    monkeypatch.setattr(corruptions, "PIECE_VALUES", 2 * images[0].numel())
    assert torch.equal(whole, corrupt(images, name, 3, seed=5))
    assert torch.equal(images, before)
    same = name not in NOISES
    assert torch.equal(whole, corrupt(images, name, 3, seed=6)) == same
    assert torch.equal(whole[4:6], corrupt(images[4:6], name, 3, seed=5)) == same


def test_equal_images_get_different_noise():
    noisy = corrupt(gray(128, count=2), "gaussian_noise", 1, seed=0)
    assert not torch.equal(noisy[0], noisy[1])


def test_corrupted_keeps_the_labels():
    clean = dataset(random_images())
    low = corrupted(clean, "contrast", 4, seed=0)
    assert low.name == "here contrast 4"
    assert torch.equal(low.images, corrupt(clean.images, "contrast", 4, seed=0))
    assert torch.equal(low.labels, clean.labels)
    assert low.class_names == clean.class_names


@pytest.mark.parametrize("chosen", [TRAINED, HELD_OUT])
def test_randomly_corrupted_tells_what_each_image_got(chosen):
    clean = dataset(random_images(60))
    mixed, quality = randomly_corrupted(clean, seed=3, corruptions=chosen)
    assert torch.equal(mixed.labels, clean.labels)
    assert quality.names == ("clean", *chosen)
    for row, (kind, severity) in enumerate(zip(quality.corruption.tolist(), quality.severity.tolist(), strict=True)):
        expected = clean if kind == 0 else corrupted(clean, quality.names[kind], severity, seed=3)
        assert torch.equal(mixed.images[row], expected.images[row])
        assert (severity == 0) == (kind == 0)
    assert set(quality.corruption.tolist()) == set(range(len(chosen) + 1))


def test_randomly_corrupted_draws_kinds_and_severities_evenly():
    _, quality = randomly_corrupted(dataset(random_images(3000, 1, 2)), seed=0)
    kinds = torch.bincount(quality.corruption, minlength=6)
    assert (kinds - 500).abs().max() < 80  # 4 standard deviations of a binomial count of mean 500
    severities = torch.bincount(quality.severity, minlength=6)
    assert severities[0] == kinds[0]
    assert (severities[1:] - 500).abs().max() < 80


def test_images_kept_together_share_their_quality_and_are_what_the_corruption_makes_of_them():
    clean = dataset(random_images(70, 4, 4))
    mixed, quality = randomly_corrupted(clean, seed=2, together=32)
    kinds = list(zip(quality.corruption.tolist(), quality.severity.tolist(), strict=True))
    assert [len(set(kinds[start : start + 32])) for start in (0, 32, 64)] == [1, 1, 1] and len(set(kinds)) > 1
    name, severity = quality.names[kinds[40][0]], kinds[40][1]
    expected = clean.images if severity == 0 else corrupted(clean, name, severity, seed=2).images
    assert torch.equal(mixed.images[32:64], expected[32:64])
    with pytest.raises(BitscapeError, match="together is 0"):
        randomly_corrupted(clean, seed=2, together=0)


def test_randomly_corrupted_of_fewer_images_is_a_prefix_and_seeds_differ():
    images = random_images(40)
    mixed, quality = randomly_corrupted(dataset(images), seed=1)
    fewer, prefix = randomly_corrupted(dataset(images[:17]), seed=1)
    assert torch.equal(fewer.images, mixed.images[:17])
    assert torch.equal(prefix.severity, quality.severity[:17])
    _, other = randomly_corrupted(dataset(images), seed=2)
    assert not torch.equal(other.corruption, quality.corruption)


def test_no_corruption_is_both_trained_and_held_out():
    assert not set(TRAINED) & set(HELD_OUT)
    assert set(TRAINED) | set(HELD_OUT) <= set(CORRUPTIONS)


def test_errors_name_the_argument_and_what_is_allowed():
    images = random_images()
    with pytest.raises(BitscapeError, match=r"no corruption 'gausian_noise'; nearest: gaussian_noise.*allowed are"):
        corrupt(images, "gausian_noise", 1, seed=0)
    for severity in (0, 6, 2.0, True):
        with pytest.raises(BitscapeError, match=f"severity is {severity}; allowed are whole numbers 1 to 5"):
            corrupt(images, "jpeg", severity, seed=0)
    for wrong in (images.float(), images[0], images[:, :1], images[:0]):
        with pytest.raises(BitscapeError, match=r"must be uint8 \(n, 3, h, w\)"):
            corrupt(wrong, "jpeg", 1, seed=0)
    for rows in (torch.arange(3), torch.zeros(6)):
        with pytest.raises(BitscapeError, match=r"6 images need int64 of shape \(6,\)"):
            corrupt(images, "jpeg", 1, seed=0, rows=rows)
    for chosen in ((), ("jpeg", "jpeg")):
        with pytest.raises(BitscapeError, match=r"corruptions is .* allowed are one or more of"):
            randomly_corrupted(dataset(images), seed=0, corruptions=chosen)
    with pytest.raises(BitscapeError, match="corruptions: no corruption 'jpg'; nearest: jpeg"):
        randomly_corrupted(dataset(images), seed=0, corruptions=("jpg",))
    with pytest.raises(BitscapeError, match=r"must be uint8 \(n, 3, h, w\)"):
        randomly_corrupted(dataset(images[:, :1]), seed=0)
