"""Random numbers that depend on a place in a run alone, apart from those of whatever else draws."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
_END = object()


def seed_of(*position: object) -> int:
    """Return a seed of 32 bits, the same for the same position: sums of seed and epoch would repeat
    streams.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, position)).encode()).digest()[:4], "big")


class RandomStream:
    """What Python, numpy and torch (on the CPU) draw within its blocks goes on from block to block."""

    def __init__(self, *position: object) -> None:
        self._seed: int | None = seed_of(*position)
        self._state: Any = None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the block the global random states are the stream's; afterwards those of before."""
        before = _state()
        if self._seed is None:
            _restore(self._state)
        else:
            random.seed(self._seed)
            np.random.seed(self._seed)
            torch.default_generator.manual_seed(self._seed)
            self._seed = None
        try:
            yield
        finally:
            self._state = _state()
            _restore(before)

    def through(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, each made within a block; between them the random states are the caller's."""
        with self.drawing():
            iterator = iter(items)
        while True:
            with self.drawing():
                item: Any = next(iterator, _END)
            if item is _END:
                return
            yield item


def generators_of(data: object) -> Iterator[torch.Generator]:
    """Yield the generators of its own that a dataset, or a loader with its samplers, draws from."""
    parts = [getattr(data, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    for part in (data, *parts):
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            yield generator


@contextmanager
def own_generators(data: object, *position: object) -> Iterator[None]:
    """Within the block the generators of `data` have a seed of the position; afterwards their
    states of before.
    """
    states = [(generator, generator.get_state()) for generator in generators_of(data)]
    for generator, _ in states:
        generator.manual_seed(seed_of(*position, "loader"))
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore(state: tuple[Any, ...]) -> None:
    of_python, of_numpy, of_torch = state
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
