import pytest

import bitscape as bs
from bitscape import adapters

POLICY = bs.Policy(
    {
        "a": bs.LayerBits(4, 8),
        "b": bs.LayerBits(8, 8),
        "c": bs.LayerBits(4, 8),
        "d": bs.LayerBits(8, 16),
    }
)
NAMES = {"a": "net/conv1", "b": "net/conv2", "c": "net/dw1", "d": "net/fc1"}


def test_layers_of_one_mode_stand_in_one_line():
    assert adapters.to_hailo(POLICY, NAMES, rounding="up") == (
        "quantization_param([net/conv1, net/dw1], precision_mode=a8_w4)\n"
        "quantization_param([net/conv2], precision_mode=a8_w8)\n"
        "quantization_param([net/fc1], precision_mode=a16_w16)\n"
    )


def test_widths_and_names_that_are_missing_are_refused():
    with pytest.raises(
        bs.BitscapeError, match=r"layer 'd': Hailo's compiler has no 8/16 .* only 4/8, 8/8, 16/16"
    ):
        adapters.to_hailo(POLICY, NAMES)
    with pytest.raises(bs.BitscapeError, match="names: none for layer 'b'"):
        adapters.to_hailo(POLICY, {"a": "net/conv1"})
