from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitscape.data.batches import DIGITS, IMAGENET, UNIT, Batches
from bitscape.data.corruptions import CORRUPTIONS, corrupted
from bitscape.data.sources import Dataset, load_dataset
from bitscape.engine import QualityTable, Spent, evaluate, quality_table
from bitscape.engine.quality_table import Cell
from bitscape.errors import BitscapeError


def gray(values: list[int], labels: list[int], batch_size: int = 3) -> Batches:
    """Images of one gray each, which a blur and a lower contrast leave as they are."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    dataset = Dataset("gray", images, torch.tensor(labels), ("dark", "bright"))
    return Batches(dataset=dataset, normalization=UNIT, batch_size=batch_size)


def random_batches() -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (13, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(4, (13,), generator=generator)
    return Batches(dataset=Dataset("random", images, labels, ("a", "b", "c", "d")), normalization=IMAGENET, batch_size=5)


def small_net() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4))


class BrightAboveHalf(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        brightness = images.mean((1, 2, 3)) - 0.5
        return torch.stack([-brightness, brightness], dim=1)


class BitsByGray(BrightAboveHalf):
    """Spends as many bits as the gray value of an image, and ten BitOps a bit."""

    spent: Spent

    def forward(self, images: Tensor) -> Tensor:
        values = images.mean((1, 2, 3)) * 255
        self.spent = Spent(bits=values, bitops=10 * values.round().long())
        return super().forward(images)


def top1(grid: QualityTable) -> dict[tuple[str, int], float]:
    return {(cell.corruption, cell.severity): cell.top1 for cell in grid.cells}


def test_dark_images_are_lost_where_brightness_lifts_them_over_the_half() -> None:
    # 100/255 = 0.39 passes one half with +0.15, severity 3; 60/255 = 0.24 with +0.30, severity 5; 10/255 = 0.04 never.
    grid = quality_table(BrightAboveHalf(), gray([100, 60, 10, 200], [0, 0, 0, 1]), corruptions=("brightness", "gaussian_blur", "contrast"))
    assert top1(grid) == {
        ("clean", 0): 100,
        **{("brightness", severity): value for severity, value in enumerate((100, 100, 75, 75, 50), start=1)},
        **{(name, severity): 100 for name in ("gaussian_blur", "contrast") for severity in range(1, 6)},
    }
    assert grid.mean() == pytest.approx((80 + 100 + 100) / 3)
    assert grid.mean(["brightness"]) == pytest.approx(80)
    assert grid.mean(("brightness", "contrast")) == pytest.approx(90)
    assert grid.corruptions == ("brightness", "gaussian_blur", "contrast") and grid.severities == (1, 2, 3, 4, 5)


def test_every_cell_is_evaluate_on_the_corrupted_images() -> None:
    model, batches = small_net(), random_batches()
    grid = quality_table(model, batches, severities=(2, 5), seed=3)
    assert len(grid.cells) == 1 + 2 * len(CORRUPTIONS)
    for cell in grid.cells:
        dataset = batches.dataset
        if cell.severity:
            dataset = corrupted(dataset, cell.corruption, cell.severity, seed=3)
        accuracy = evaluate(model, replace(batches, dataset=dataset))
        assert (cell.top1, cell.loss, cell.images) == (accuracy.top1, accuracy.loss, 13)
        assert cell.bits is None and cell.bitops is None
    assert grid.clean == grid.cells[0] and grid.clean.corruption == "clean"
    assert len({cell.loss for cell in grid.cells}) == len(grid.cells)


def test_the_seed_is_that_of_the_noise() -> None:
    def losses(seed: int) -> list[float]:
        return [cell.loss for cell in quality_table(small_net(), random_batches(), corruptions=["shot_noise"], seed=seed).cells]

    assert losses(0) == losses(0)
    assert losses(0)[0] == losses(1)[0]
    assert all(one != other for one, other in zip(losses(0)[1:], losses(1)[1:], strict=True))


def test_bits_are_means_over_images_not_over_batches() -> None:
    values = [1, 2, 4, 8, 16, 32, 64]  # in batches of 3, 3 and 1: the mean of the batches' means would be 28.3
    batches = gray(values, [0] * 7)
    grid = quality_table(BitsByGray(), batches, corruptions=["brightness"], severities=[3])
    clean, brighter = grid.cells
    assert clean.bits == pytest.approx(127 / 7)
    assert clean.bitops == pytest.approx(1270 / 7)
    assert brighter.bits == pytest.approx(127 / 7 + 38)  # 0.15 * 255 = 38.25, rounded to whole pixels
    assert brighter.bitops == pytest.approx(1270 / 7 + 380)


class OneNumberForTheBatch(BitsByGray):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        self.spent = Spent(bits=self.spent.bits, bitops=self.spent.bitops.sum())
        return logits


def test_the_model_is_left_as_it_was() -> None:
    model = small_net().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    quality_table(model, random_batches(), corruptions=["contrast"], severities=[1])
    assert [module.training for module in model.modules()] == before
    assert not model._forward_hooks


def test_spent_without_a_number_for_each_image_is_refused() -> None:
    model = OneNumberForTheBatch().train()
    with pytest.raises(BitscapeError, match=r"spent\.bitops has shape \(\) after 3 images; the network must set \(3,\)"):
        quality_table(model, gray([1, 2, 3], [0, 0, 0]))
    assert model.training and not model._forward_hooks


class Uncalled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError("evaluated before the arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corruptions": ("jpeg", "pixelated")}, r"corruptions is \('jpeg', 'pixelated'\); nearest: pixelate; allowed .*gaussian_noise,"),
        ({"corruptions": ("clean",)}, r"corruptions is \('clean',\)"),
        ({"corruptions": ("jpeg", "jpeg")}, "each once"),
        ({"corruptions": ()}, r"corruptions is \(\)"),
        ({"severities": (1, 6)}, r"severities is \(1, 6\); allowed .* 1 to 5"),
        ({"severities": (1.0,)}, r"severities is \(1\.0,\)"),
        ({"severities": (2, 2)}, "each once"),
        ({"severities": ()}, r"severities is \(\)"),
    ],
)
def test_what_is_not_a_cell_is_refused_before_any_work(arguments: dict[str, tuple[object, ...]], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        quality_table(Uncalled(), random_batches(), **arguments)


def test_images_of_one_channel_are_refused_before_any_work() -> None:
    with pytest.raises(BitscapeError, match=r"uint8 \(n, 3, h, w\).*repeat a single channel"):
        quality_table(Uncalled(), Batches(dataset=load_dataset("digits", limit=5), normalization=DIGITS))


def test_a_mean_over_what_the_grid_lacks_is_refused() -> None:
    cells = [Cell(corruption=name, severity=severity, top1=50.0, loss=1.0, images=2) for name, severity in (("clean", 0), ("jpeg", 4))]
    grid = QualityTable(tuple(cells))
    assert grid.severities == (4,)
    for names in (["pixelate"], ["jpeg", "clean"], []):
        with pytest.raises(BitscapeError, match="allowed are one or more of jpeg, each once"):
            grid.mean(names)
