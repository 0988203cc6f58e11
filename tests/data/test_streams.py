import random

import numpy as np
import torch

from bitscape.data.streams import RandomStream, seed_of


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_stream_goes_on_from_block_to_block_whatever_is_drawn_between() -> None:
    runs = []
    for between in (0, 3):
        stream, drawn = RandomStream(1, 2), []
        for _ in range(3):
            with stream.drawing():
                drawn.append(draw())
            for _ in range(between):
                draw()
        runs.append(drawn)
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def test_the_global_states_are_those_of_before_also_after_an_error() -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    try:
        with RandomStream(5).drawing():
            draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == expected


def test_positions_have_seeds_of_their_own() -> None:
    assert len({seed_of(1, 2), seed_of(2, 1), seed_of(12), seed_of(1, 2, "order")}) == 4
    assert seed_of(3, 4) == seed_of(3, 4) < 2**32
