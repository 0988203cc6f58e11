"""Where a row of images is cut into batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True)
class Cuts(Sequence[range]):
    """The rows of each batch of a row of images.

    A last batch of fewer than `fewest` images joins the one before it: in training mode a norm takes mean and
    deviation from its batch, and a single image whose map is one pixel has none.
    """

    images: int
    """Images in all."""
    size: int
    """Images in a batch; asked for fewer than `fewest`, all batches have that size."""
    fewest: int = 2
    """Images that the last batch must hold."""

    def __len__(self) -> int:
        full, rest = divmod(self.images, self.size)
        joins = full > 0 and rest < min(self.fewest, self.size)
        return full + (rest > 0 and not joins)

    @overload
    def __getitem__(self, batch: int) -> range: ...
    @overload
    def __getitem__(self, batch: slice) -> list[range]: ...
    def __getitem__(self, batch: int | slice) -> range | list[range]:
        numbers = range(len(self))[batch]
        return self._rows(numbers) if isinstance(numbers, int) else [self._rows(number) for number in numbers]

    def _rows(self, batch: int) -> range:
        stop = self.images if batch == len(self) - 1 else (batch + 1) * self.size
        return range(batch * self.size, stop)
