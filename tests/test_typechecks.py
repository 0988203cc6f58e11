import pytest
import torch
from jaxtyping import TypeCheckError

from bitscape.quant.grid import grid
from bitscape.quant.observers import MinMax


def test_the_shapes_of_the_quantizers_are_checked_in_tests():
    with pytest.raises(TypeCheckError, match="values"):
        MinMax().scale(torch.ones(4), grid(4, signed=True))
