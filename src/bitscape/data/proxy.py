"""Draw a proxy dataset: the few images on which bits are searched, as evenly over the classes as they allow."""

import torch
from torch import Tensor

from bitscape.data.sources import Dataset
from bitscape.errors import BitscapeError


def draw_proxy(dataset: Dataset, *, images: int, classes: int | None = None, seed: int) -> Dataset:
    """Draw `images` images without repetition, from `classes` randomly drawn classes (None = all that occur).

    Classes take turns, so their counts differ by at most one until a class runs out of images. Labels keep their
    numbers. The same seed with fewer images gives a prefix. Without labels the draw is uniform, and `classes` must be
    None. Raises BitscapeError when there are fewer images or classes than asked for.
    """
    _check("images", images, len(dataset), dataset.name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)
    if dataset.labels is None:
        if classes is not None:
            raise BitscapeError(f"classes={classes}, but {dataset.name} has no labels; leave classes out")
        return _named(dataset, order[:images])
    chosen = _chosen_classes(dataset, classes, images, generator)
    turns = _turns(order, dataset.labels, chosen, len(dataset.class_names))
    _check("images", images, len(turns), f"{dataset.name} in {len(chosen)} classes")
    return _named(dataset, turns[:images])


def _chosen_classes(dataset: Dataset, classes: int | None, images: int, generator: torch.Generator) -> Tensor:
    present: Tensor = torch.unique(dataset.labels)
    shuffled = present[torch.randperm(len(present), generator=generator)]
    if classes is None:
        return shuffled
    _check("classes", classes, len(present), dataset.name)
    if images < classes:
        raise BitscapeError(f"images={images} is less than classes={classes}; every class needs an image")
    return shuffled[:classes]


def _turns(order: Tensor, labels: Tensor, chosen: Tensor, class_count: int) -> Tensor:
    """Rows of the chosen classes: the first of each class in `order`, then the second of each, and so on."""
    position = torch.full((class_count,), -1)
    position[chosen] = torch.arange(len(chosen))
    order = order[position[labels[order]] >= 0]
    by_class = order[torch.argsort(position[labels[order]], stable=True)]
    counts = torch.bincount(position[labels[by_class]], minlength=len(chosen))
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turn = torch.arange(len(by_class)) - starts
    return by_class[torch.argsort(turn, stable=True)]


def _named(dataset: Dataset, rows: Tensor) -> Dataset:
    return dataset.subset(rows, f"{dataset.name} proxy of {len(rows)}")


def _check(name: str, value: int, most: int, where: str) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise BitscapeError(f"{name} is {value!r}; {where} allows 1 to {most}")
