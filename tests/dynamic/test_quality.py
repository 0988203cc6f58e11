import math

import pytest
import torch
from torch import Tensor

from bitscape.data.corruptions import corrupt
from bitscape.dynamic.quality import IMAGE_FEATURES, LAYER_FEATURES, SIDE, image_features, layer_features

GRADIENT, RESIDUAL, CONTRAST = range(3)


def deviation(values: list[float]) -> float:
    middle = sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / len(values))


def drawn_images(count: int = 6, size: int = 32) -> Tensor:
    """A shaded background and a disk with an edge, far from black and white."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    middle = torch.randint(10, 22, (count, 2, 1, 1), generator=generator)
    disk = ((x - middle[:, 0]) ** 2 + (y - middle[:, 1]) ** 2 < 60)[:, None]
    color = torch.rand(count, 3, 1, 1, generator=generator)
    return (60 + 60 * color * x / size + 60 * disk).to(torch.uint8)


def features_of(images: Tensor) -> Tensor:
    return image_features(images / 255 - 0.5)


def test_a_constant_image_has_no_gradient_residual_or_contrast() -> None:
    images = torch.tensor([0.0, -1.5, 2.0]).view(3, 1, 1, 1).expand(3, 2, 5, 7)
    assert image_features(images).shape == (3, len(IMAGE_FEATURES))
    torch.testing.assert_close(image_features(images), torch.zeros(3, 3), atol=1e-6, rtol=0)


def test_a_step_edge_by_hand() -> None:
    # Columns 0 0 1 1. One of three steps across is 1, none down; the box filter's residual of the inner columns is -1/3 and 1/3.
    image = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 1, 4, 4)
    expected = [(1 / 3 + 0) / 2, deviation([0, -1 / 3, 1 / 3, 0] * 4), deviation([0, 0, 1, 1] * 4)]
    torch.testing.assert_close(image_features(image), torch.tensor([expected]))
    torch.testing.assert_close(image_features(image.mT), torch.tensor([expected]))


def test_a_checkerboard_by_hand() -> None:
    # Steps are 2. Of the nine values around an inner pixel s five are s and four -s, so its residual is s - s / 9; edges repeat.
    side = 6
    rows = torch.arange(side)
    board = (1 - 2 * ((rows[:, None] + rows) % 2)).float()
    by_hand = []
    for row in range(side):
        for column in range(side):
            around = [(min(max(row + i, 0), side - 1), min(max(column + j, 0), side - 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            by_hand.append(float(board[row, column]) - sum(float(board[at]) for at in around) / 9)
    assert by_hand[side + 1] == pytest.approx(8 / 9)
    found = image_features(board[None, None])[0]
    torch.testing.assert_close(found, torch.tensor([2.0, deviation(by_hand), deviation(board.flatten().tolist())]))


def test_channels_count_alike_and_images_apart() -> None:
    torch.manual_seed(0)
    images = torch.randn(5, 3, 9, 8)
    torch.testing.assert_close(image_features(images[:, [2, 0, 1]]), image_features(images))
    for at in range(5):
        torch.testing.assert_close(image_features(images[at : at + 1])[0], image_features(images)[at])
    others = images.clone()
    others[1:] = 100
    torch.testing.assert_close(image_features(others)[0], image_features(images)[0])


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_features_follow_the_scale_and_ignore_an_offset(factor: float) -> None:
    torch.manual_seed(1)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(image_features(factor * images + 1), factor * image_features(images))


@pytest.mark.parametrize(
    ("corruption", "feature", "sign"),
    [
        ("gaussian_noise", RESIDUAL, 1),
        ("gaussian_noise", GRADIENT, 1),
        ("shot_noise", RESIDUAL, 1),
        ("gaussian_blur", GRADIENT, -1),
        ("gaussian_blur", RESIDUAL, -1),
        ("defocus_blur", RESIDUAL, -1),
        ("contrast", CONTRAST, -1),
        ("contrast", GRADIENT, -1),
    ],
)
def test_each_corruption_moves_its_feature_the_further_the_more_severe(corruption: str, feature: int, sign: int) -> None:
    images = drawn_images()
    severities = [features_of(images), *(features_of(corrupt(images, corruption, severity, seed=0)) for severity in (1, 3, 5))]
    along = sign * torch.stack(severities)[:, :, feature]
    assert bool((along.diff(dim=0) > 0).all())


def test_layer_features_are_mean_and_deviation_where_they_look() -> None:
    torch.manual_seed(0)
    flat = torch.randn(4, 10)
    torch.testing.assert_close(layer_features(flat), torch.stack([flat.mean(1), flat.std(1, correction=0)], 1))
    assert layer_features(flat).shape == (4, len(LAYER_FEATURES))
    signal = torch.randn(4, 3, 16)
    seen = signal[:, :, ::4].flatten(1)
    torch.testing.assert_close(layer_features(signal), torch.stack([seen.mean(1), seen.std(1, correction=0)], 1))
    maps = torch.randn(4, 3, 8, 16)
    seen = maps[:, :, ::2, ::4].flatten(1)
    torch.testing.assert_close(layer_features(maps), torch.stack([seen.mean(1), seen.std(1, correction=0)], 1))


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2), (3, 5, 3, 2)])
def test_small_inputs_are_seen_whole(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    flat = x.flatten(1)
    torch.testing.assert_close(layer_features(x), torch.stack([flat.mean(1), flat.std(1, correction=0)], 1))


@pytest.mark.parametrize("side", [4, 5, 7, 8, 11, 14, 28, 32])
def test_a_map_is_seen_at_no_more_than_16_positions(side: int) -> None:
    # So many are counted as the decision's cost. One image for each position, in which it alone is lit.
    lit = torch.eye(side * side).view(-1, 1, side, side)
    touched = int((layer_features(lit)[:, 0] > 0).sum())
    assert 4 <= touched <= SIDE**2


def test_layer_features_are_float32_and_detached() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    found = layer_features(x)
    assert found.dtype == torch.float32 and not found.requires_grad
    for at in range(2):
        torch.testing.assert_close(layer_features(x[at : at + 1])[0], found[at])
