import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import quantize
from bitscape.search.fisher import Fisher
from bitscape.search.methods import SearchMethod
from bitscape.search.problem import DEFAULT_CANDIDATES, SearchProblem
from bitscape.search.random_policy import Random
from bitscape.search.uniform import Uniform


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def problem(**changes: Any) -> SearchProblem:
    settings: dict[str, Any] = {"model": net(), "images": torch.zeros(2, 3, 8, 8), "budget": "bitops=0.5x"}
    return SearchProblem(**{**settings, **changes})


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


def test_defaults_pin_the_ends_and_offer_all_pairs() -> None:
    stated = problem()
    assert stated.pinned_layers == {"0": LayerBits(8, 8), "6": LayerBits(8, 8)}
    assert stated.free_layers == ("3", "4")
    assert len(stated.candidates) == len(DEFAULT_CANDIDATES) == 36
    assert problem(pinned={}).free_layers == ("0", "3", "4", "6")
    bitops_at_8 = sum(layer.macs for layer in stated.network.layers) * 64
    assert stated.parsed_budget.caps == {"bitops": bitops_at_8 / 2}


def test_the_callers_model_is_left_alone_and_the_prepared_one_is_made_once() -> None:
    model = Attention().train()
    before = copy.deepcopy(model.state_dict())
    stated = problem(model=model)
    assert stated.prepared is stated.prepared
    assert not stated.prepared.training and model.training
    assert isinstance(model.attention, nn.MultiheadAttention)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {"attention.q_proj", "attention.out_proj"} <= set(stated.free_layers)
    assert stated.network.shapes == layer_shapes(stated.prepared)


def test_layers_tied_to_a_pinned_one_are_pinned() -> None:
    stated = problem(pinned={"3": LayerBits(2, 4)}, tied=[("3", "4")])
    assert stated.pinned_layers == {"3": LayerBits(2, 4), "4": LayerBits(2, 4)}
    assert stated.free_layers == ("0", "6")
    assert [group for group in problem(pinned={}, tied=[("6", "0")]).freedom.groups] == [("0", "6"), ("3",), ("4",)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet"}, "model: str is no"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "torch.uint8; give a float32"),
        ({"images": [1.0]}, "images: list"),
        ({"images": torch.zeros(3, 8, 8)}, r"shape \(3, 8, 8\); give at least one image as \(n, c, h, w\)"),
        ({"images": torch.zeros(0, 3, 8, 8)}, "at least one image"),
        ({"images": torch.zeros(2, 1, 8, 8)}, r"shape \(1, 1, 8, 8\)"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"labels: torch.int64 \(3,\); give one int64 label per image, shape \(2,\)",
        ),
        ({"labels": [0, 1]}, "labels: list"),
        ({"candidates": ()}, "candidates: none given"),
        ({"candidates": [LayerBits(4, 4), LayerBits(4, 4)]}, "4/4 stands twice"),
        ({"pinned": {"33": LayerBits(8, 8)}}, "pinned: the network has no layer '33'; nearest: 3"),
        ({"pinned": {"3": 8}}, "pinned: layer '3' has 8; write"),
        ({"tied": [("3", "44")]}, "tied: the network has no layer '44'; nearest: 4"),
        ({"tied": ["34"]}, "tied: '34' is no group"),
        ({"tied": [("3",)]}, "is no group"),
        ({"pinned": {"3": LayerBits(8, 8), "4": LayerBits(4, 4)}, "tied": [("3", "4")]}, "3 at 8/8, 4 at 4/4"),
        ({"budget": "bitopps=0.5x"}, "bitopps"),
        ({"budget": ()}, "budget"),
        ({"budget": 4}, r'budget: 4 is no text.*"bitops=0.25x"'),
        ({"budget": None}, "budget: None is no text"),
        ({"budget": ["bitops=0.5x", 4]}, "budget: 4 is no text"),
        ({"budget": b"bitops=0.5x"}, "budget: .* is no text"),
    ],
)
def test_mistakes_are_refused_at_the_door(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        problem(**changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_named(value: float) -> None:
    images = torch.zeros(4, 3, 8, 8)
    images[2, 1, 7, 0] = value
    with pytest.raises(BitscapeError, match=rf"image 2 holds {value} at \(channel, row, column\) \(1, 7, 0\)"):
        problem(images=images)


def _spoiled(name: str, value: float) -> nn.Module:
    model = net()
    model.state_dict()[name].view(-1)[1:3] = value
    return model


@pytest.mark.parametrize(
    ("name", "value"),
    [("3.weight", float("nan")), ("6.bias", float("-inf")), ("1.running_var", float("inf")), ("1.running_mean", float("nan"))],
)
def test_values_of_the_model_that_are_not_finite_are_named(name: str, value: float) -> None:
    with pytest.raises(BitscapeError, match=rf"model: {name} holds 2 values that are not finite \({value} first\); .*load"):
        problem(model=_spoiled(name, value))


def test_a_buffer_may_hold_the_minus_infinity_of_a_mask() -> None:
    model = net()
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    assert problem(model=model).free_layers == ("3", "4")


def test_a_model_on_the_meta_device_has_no_values_to_check() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 5))
    assert problem(model=model).free_layers == ("1",)


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(BitscapeError, match=r"model: its layer '0' is quantized already.*float network"):
        problem(model=quantize(net(), uniform_policy(layer_shapes(net()), LayerBits(4, 4))))


def test_weights_may_be_frozen_and_stay_so() -> None:
    stated = problem(model=net().requires_grad_(False))
    assert all(p.requires_grad for p in stated.prepared.parameters())
    assert not any(p.requires_grad for p in stated.model.parameters())


def test_a_layer_that_is_never_called_cannot_be_pinned() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = net()
            self.unused = nn.Linear(2, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.used(images)

    with pytest.raises(BitscapeError, match="never calls layer 'unused'"):
        problem(model=Unused(), pinned={"unused": LayerBits(8, 8)})


def test_a_model_that_cannot_be_copied_is_told() -> None:
    model = net()
    model.kept = model[0].weight * 2  # type: ignore[assignment]
    with pytest.raises(BitscapeError, match="cannot be copied"):
        problem(model=model)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (Uniform(), {"pick": "least-sharp"}, "pick='least-sharp': uniform has no scores.*use pick='best', or a method with scores"),
        (Random(), {"pick": "least-sharp"}, "pick='least-sharp': random has no scores"),
        (Random(), {"folder": "run"}, "folder='run': random does not train and keeps nothing there; leave folder out"),
        (Fisher(), {"folder": Path("run")}, "folder='run': fisher does not train"),
    ],
)
def test_what_would_have_no_effect_is_refused(method: SearchMethod, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        method.search(problem(budget="bitops=1x", **changes))


def test_provenance_says_how_it_was_found() -> None:
    told = problem(seed=7).provenance(Uniform(mix=True))
    assert told["method"] == "uniform" and told["settings"] == {"mix": True} and told["seed"] == 7
    assert set(told["budget"]) == {"bitops"} and told["version"]
