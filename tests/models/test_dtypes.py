import numpy as np
import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.dtypes import check_float32, check_images, check_inputs, check_module


def test_float32_passes_whatever_else_is_not_floating_point():
    model = nn.Linear(2, 2)
    model.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    model.register_buffer("table", torch.zeros(2, dtype=torch.float64))
    check_float32(model)
    check_images(torch.zeros(1, 3, 2, 2))


def test_one_parameter_of_another_type_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    with pytest.raises(BitscapeError, match=r"^float_model: parameter 1\.weight is torch\.float16; .* call float_model\.float\(\) first$"):
        check_float32(model, "float_model")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), r"example: torch\.float64; give a float32 tensor: call example\.float\(\)$"),
        (torch.zeros(2, dtype=torch.bfloat16), r"example: torch\.bfloat16; give a float32 tensor: call example\.float\(\)$"),
        (torch.zeros(2, dtype=torch.int64), r"example: torch\.int64; give a float32 tensor: normalize them"),
        (np.zeros(2), "example: a ndarray where a tensor is needed"),
        (None, "example: a NoneType where a tensor is needed"),
        (torch.zeros(0, 3, 2, 2), r"example: shape \(0, 3, 2, 2\); give at least one image"),
        (torch.tensor(1.0), r"example: shape \(\); give at least one image"),
    ],
)
def test_other_images_are_refused_with_the_next_step(images, message):
    with pytest.raises(BitscapeError, match=message):
        check_images(images, "example")


def test_a_network_with_an_embedding_may_take_indices():
    indices = torch.zeros(2, 3, dtype=torch.int64)
    check_images(indices, model=nn.Sequential(nn.Embedding(4, 2)))
    with pytest.raises(BitscapeError, match=r"torch\.int64"):
        check_images(indices, model=nn.Sequential(nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear, "model: the class Linear where a network is needed"),
        (None, "model: a NoneType where a network is needed"),
    ],
)
def test_what_is_no_network_of_modules_is_refused(model, message):
    with pytest.raises(BitscapeError, match=message):
        check_module(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
def test_a_scripted_network_is_refused_with_the_next_step():
    with pytest.raises(BitscapeError, match=r"model: torch\.jit scripted or traced it.*give the network itself"):
        check_module(torch.jit.script(nn.Sequential(nn.Linear(2, 2))))


IMAGE, INDEX, MASK = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize("inputs", [(IMAGE, INDEX), {"image": IMAGE, "mask": MASK}, (IMAGE, (INDEX.int(), torch.tensor(0.5)))], ids=str)
def test_indices_and_masks_may_stand_beside_images(inputs):
    check_inputs(inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IMAGE, IMAGE.double()), r"^images\[1\]: torch\.float64; give float32 values, int64 or int32 indices, or bool masks"),
        ({"image": IMAGE.byte(), "index": INDEX}, r"^images\['image'\]: torch\.uint8; give float32"),
        (((IMAGE.half(),), INDEX), r"^images\[0\]\[0\]: torch\.float16"),
        ((INDEX, MASK), r"^images: torch\.int64, torch\.bool; give at least one float32 tensor"),
        ((IMAGE[:0], INDEX[:0]), r"^images: a batch of no sample"),
        ((IMAGE.double(),), r"^images: torch\.float64; give a float32 tensor"),
        ({}, r"^images: a dict where a tensor is needed"),
    ],
)
def test_other_inputs_are_refused_by_name(inputs, message):
    with pytest.raises(BitscapeError, match=message):
        check_inputs(inputs)


def test_indices_alone_are_for_networks_with_an_embedding():
    check_inputs((INDEX, MASK), model=nn.Sequential(nn.Embedding(4, 2)))
