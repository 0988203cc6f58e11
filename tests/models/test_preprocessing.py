import importlib.util

import pytest
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.find import find_model
from bitscape.models.preprocessing import ImageConfig, _of_processor, image_config

STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def timm_like(**config):
    model = nn.Linear(1, 1)
    model.pretrained_cfg = config
    return model


def test_a_network_of_timm_tells():
    model = timm_like(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 32, 32), test_input_size=(3, 48, 48))
    assert image_config(model) == ImageConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), size=32)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"size": 32}, 32),
        ({"size": {"shortest_edge": 32}}, 32),
        ({"size": {"height": 32, "width": 32}}, 32),
        ({"size": [32, 32]}, 32),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, 32),
        ({"size": {"shortest_edge": 40}, "do_center_crop": False, "crop_size": {"height": 32, "width": 32}}, 40),
        ({"size": {"shortest_edge": 40}, "crop_size": 32}, 40),
        ({}, None),
    ],
)
def test_forms_of_the_size(config, size):
    assert _of_processor({**STATISTICS, **config}) == ImageConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), size=size)


def test_values_that_are_not_normalized_are_0_to_1():
    assert _of_processor({**STATISTICS, "do_normalize": False}) == ImageConfig(mean=(0.0,) * 3, std=(1.0,) * 3, size=None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), "Linear has no configuration that tells its images; networks of timm: and hf: have one"),
        (timm_like(), "no configuration"),
        (timm_like(mean=(0.5,), std=(0.5,)), "cannot be used: KeyError: 'input_size'"),
        (timm_like(mean=(0.5,), std=(0.5,), input_size=(3, 32, 64)), "the images are no squares"),
        (timm_like(mean=0.5, std=(0.5,), input_size=(3, 32, 32)), "cannot be used: TypeError"),
    ],
)
def test_what_tells_nothing_usable_is_an_error(model, message):
    with pytest.raises(BitscapeError, match=message):
        image_config(model)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_real_network_of_timm():
    config = image_config(find_model("timm:mobilenetv2_050"))
    assert config == ImageConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224)
