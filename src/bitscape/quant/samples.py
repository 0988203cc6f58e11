"""A sample of the values that pass a place in a network, of bounded size however many batches pass."""

import torch
from torch import Tensor

SAMPLES_PER_BATCH = 1 << 13
"""Values drawn from a batch: eight batches are enough for a percentile of 99.9."""
SAMPLES = 1 << 16
"""Values kept of all batches: a range search over them is fast."""


class ValueSample:
    """Values drawn from batches, and the extremes of all values that were seen.

    Each value that was drawn has the same chance to stay: it draws a key, and the smallest keys stay. The same batches give the
    same sample, so that layers which read one tensor get one range. Up to twice SAMPLES are in memory.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._values: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._count = 0
        self._largest_key = 1.0
        self._extremes: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Draw from a batch of values of any shape and floating-point type."""
        flat = values.detach().flatten()
        # The extremes always belong to the sample: they decide the sign, and min-max ranges.
        extremes = torch.stack(flat.aminmax()).float()
        self._extremes = extremes if self._extremes is None else torch.stack(torch.cat([self._extremes, extremes]).aminmax())
        if flat.numel() > SAMPLES_PER_BATCH:
            # Drawn, not every k-th: sizes of maps are powers of two, and a stride that divides them sees one column of every map.
            drawn = torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=self._generator)
            flat = flat[drawn.to(flat.device)]
        keys = torch.rand(flat.numel(), dtype=torch.float32, generator=self._generator)
        enters = keys < self._largest_key
        if enters.any():
            self._values.append(flat[enters.to(flat.device)].float())
            self._keys.append(keys[enters])
            self._count += len(self._keys[-1])
        if self._count > 2 * SAMPLES:
            self._thin()

    def values(self) -> Tensor:
        """The sample, float32 (n,), the extremes last; at most SAMPLES + 2. Needs a batch."""
        assert self._extremes is not None, "no batch was added"
        if self._count > SAMPLES:
            self._thin()
        return torch.cat([*self._values, self._extremes])

    def _thin(self) -> None:
        keys, index = torch.cat(self._keys).topk(SAMPLES, largest=False)
        values = torch.cat(self._values)
        self._values, self._keys, self._count = [values[index.to(values.device)]], [keys], SAMPLES
        self._largest_key = float(keys[-1])
