import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitscape.cost.latency import LatencyTable
from bitscape.cost.policy_cost import policy_cost
from bitscape.cost.targets import TARGETS
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, fingerprint, uniform_policy
from bitscape.quant.convert import with_quantizers
from bitscape.searches.choices import DEFAULT_CANDIDATES
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.fisher import Fisher
from bitscape.searches.hawq import Hawq
from bitscape.searches.kl import Kl
from bitscape.searches.local import Local
from bitscape.searches.methods import SearchMethod
from bitscape.searches.problem import SearchProblem
from bitscape.searches.random_policy import Random
from bitscape.searches.uniform import Uniform
from bitscape.verbs.search import search


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
    settings: dict[str, Any] = {"model": net(), "samples": torch.zeros(2, 3, 8, 8), "budget": "bitops=0.5x"}
    return SearchProblem.of(**{**settings, **changes})


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
    assert stated.choices.freedom.pinned == {"0": LayerBits(8, 8), "6": LayerBits(8, 8)}
    assert stated.free_layers == ("3", "4")
    assert len(stated.choices.candidates) == len(DEFAULT_CANDIDATES) == 36
    assert problem(pinned={}).free_layers == ("0", "3", "4", "6")
    bitops_at_8 = sum(layer.macs for layer in stated.network.layers) * 64
    assert stated.choices.budget.caps == {"bitops": bitops_at_8 / 2}


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
    assert stated.choices.freedom.pinned == {"3": LayerBits(2, 4), "4": LayerBits(2, 4)}
    assert stated.free_layers == ("0", "6")
    assert [group for group in problem(pinned={}, tied=[("6", "0")]).choices.freedom.groups] == [("0", "6"), ("3",), ("4",)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet"}, "model: str is no"),
        ({"samples": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "torch.uint8; give a float32"),
        ({"samples": [1.0]}, "images: a list where a tensor is needed"),
        ({"samples": torch.zeros(3, 8, 8)}, r"fails on a batch of shape \(2, 8, 8\)"),
        ({"samples": torch.zeros(0, 3, 8, 8)}, "at least one image"),
        ({"samples": torch.zeros(2, 1, 8, 8)}, r"shape \(2, 1, 8, 8\), torch.float32: .*channels"),
        (
            {"samples": Samples.of(torch.zeros(2, 3, 8, 8), torch.zeros(3, dtype=torch.int64))},
            r"targets: shape \(3,\) for 2 samples; give one for each sample",
        ),
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
        problem(samples=images)


@pytest.mark.parametrize("method", [Fisher(images=4), Hawq(images=4), Kl(images=4), Local(images=4)])
@pytest.mark.parametrize(
    ("model", "images"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), torch.ones(4, 6)),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)), torch.ones(4, 2, 6)),
        (nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(2), nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(24, 3)), torch.ones(4, 1, 3, 3, 3)),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 3)), torch.ones(4, 3, dtype=torch.int64)),
    ],
)
def test_inputs_of_any_shape_and_indices_are_searched(method: SearchMethod, model: nn.Module, images: torch.Tensor) -> None:
    images = images * torch.arange(1, 5).reshape(4, *[1] * (images.ndim - 1))
    problem = SearchProblem.of(model=model.eval(), samples=images, budget="bitops=w4a4", pinned={})
    policy = method.search(problem).policy
    assert list(policy.layers) == list(layer_shapes(model))
    allowed = policy_cost(problem.network, uniform_policy(list(policy.layers), LayerBits(4, 4)))["bitops"]
    assert policy_cost(problem.network, policy)["bitops"] <= allowed


@pytest.mark.parametrize("method", [Fisher(images=2), Hawq(images=2)])
def test_images_made_in_inference_mode_and_a_caller_without_gradients_change_nothing(method: SearchMethod) -> None:
    with torch.inference_mode():
        made_there = torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        policy = method.search(problem(samples=made_there, pinned={})).policy
    assert policy.layers == method.search(problem(pinned={})).policy.layers


def test_gradients_in_inference_mode_are_refused_with_the_reason() -> None:
    with torch.inference_mode(), pytest.raises(BitscapeError, match="inference_mode is on"):
        Fisher(images=2).search(problem(pinned={}))


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
        problem(model=with_quantizers(net(), uniform_policy(layer_shapes(net()), LayerBits(4, 4))))


class NoReturn(nn.Sequential):
    """Keeps its norms in eval mode, as backbones of detectors do, and returns nothing."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self[1].eval()


def test_a_train_method_that_returns_nothing_is_no_obstacle() -> None:
    stated = problem(model=NoReturn(*net()).requires_grad_(True))
    assert stated.free_layers == ("3", "4")
    assert not any(module.training for module in stated.prepared.modules())


class Flattened(nn.Module):
    """LeNet's way to its linear layer: a view, which channels_last does not take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.middle, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.conv(images)).view(len(images), -1))


@pytest.mark.parametrize(("model", "takes"), [(net, True), (Flattened, False)])
def test_convolutions_are_channels_last_where_the_network_takes_it(model: Any, takes: bool) -> None:
    def is_channels_last(**settings: Any) -> bool:
        weight = next(problem(model=model(), **settings).prepared.parameters())
        return weight.is_contiguous(memory_format=torch.channels_last)

    assert is_channels_last() == takes
    assert not is_channels_last(channels_last=False)
    if not takes:
        with pytest.raises(BitscapeError, match=r"channels_last: True, but the network does not take.*view size.*or give False"):
            problem(model=model(), channels_last=True)


@pytest.mark.parametrize("method", [Fisher(), Local(), Differentiable(epochs=1, batch_size=4)])
def test_a_network_that_does_not_take_channels_last_is_searched(method: SearchMethod) -> None:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    budget = 0.25 * problem(model=Flattened()).choices.budget.caps["bitops"] / 0.5
    result = method.search(problem(model=Flattened(), samples=images, pinned={}, budget=f"bitops={budget}"))
    assert list(result.policy.layers) == ["conv", "middle", "head"]
    assert result.policy.cost["bitops"] <= budget


def test_a_network_that_draws_random_numbers_is_refused() -> None:
    class Noisy(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(images + 1, 0.5))

    with pytest.raises(BitscapeError, match="draws random numbers in eval mode"):
        problem(model=Noisy(*net()))


def test_a_weight_that_a_function_uses_too_is_refused() -> None:
    class Tied(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(super().forward(images), self[6].weight.t())

    with pytest.raises(BitscapeError, match="the weight of layer '6' is used outside of the layer"):
        problem(model=Tied(*net()))


def test_weights_may_be_frozen_and_stay_so() -> None:
    model = net().requires_grad_(False)
    assert all(p.requires_grad for p in problem(model=model).prepared.parameters())
    assert not any(p.requires_grad for p in model.parameters())


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
    model.kept = (number for number in range(3))  # type: ignore[assignment]
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
        search(net(), torch.zeros(2, 3, 8, 8), "bitops=1x", method=method, **changes)


def test_provenance_says_how_it_was_found() -> None:
    told = problem(seed=7).provenance(Uniform(mix=True))
    assert told["method"] == "uniform" and told["settings"] == {"mix": True} and told["seed"] == 7
    assert set(told["budget"]) == {"bitops"} and told["version"]


WEIGHTS_ONLY = (LayerBits(2, 8), LayerBits(4, 8), LayerBits(8, 8))


def latency(**changes: Any) -> LatencyTable:
    """Layer "3" is twice as fast at 4 bits, and as slow as at 8 at 2; the others take a millisecond whatever their bits."""
    times = {"2/8": 1.0, "4/8": 1.0, "8/8": 1.0}
    values: dict[str, Any] = {
        "runtime": "runtime 1",
        "machine": "cpu",
        "threads": 1,
        "batch_size": 1,
        "input_shape": (3, 8, 8),
        "fingerprint": fingerprint(layer_shapes(net())),
        "network_ms": 8.0,
        "float_ms": 9.0,
        "layers": {"0": times, "3": {**times, "4/8": 0.5}, "4": times, "6": times},
    }
    return LatencyTable(**{**values, **changes})


def test_a_cap_in_milliseconds_is_kept_and_the_policy_says_where_it_was_measured() -> None:
    stated = problem(budget="latency_ms=0.9x", candidates=WEIGHTS_ONLY, latency=latency())
    assert stated.choices.budget.caps == {"latency_ms": 7.2}
    policy = Fisher(images=2).search(stated).policy
    assert policy.layers["3"] == LayerBits(4, 8)
    assert policy.cost["latency_ms"] == 7.0
    assert policy.provenance["latency"] == {"runtime": "runtime 1", "machine": "cpu", "threads": 1, "batch_size": 1, "coarseness": 1.0}


def test_without_a_table_there_is_no_latency() -> None:
    stated = problem(budget="bitops=1x")
    assert "latency_ms" not in policy_cost(stated.network, uniform_policy(stated.network.by_name, LayerBits(8, 8)))
    assert not {"latency", "target"} & stated.provenance(Uniform()).keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "latency_ms=2"}, "no latency table was given; measure one .*bitscape latency build"),
        ({"latency": latency()}, "layer '3' was not measured at 2/2 .*only at 2/8, 4/8, 8/8; .*candidates"),
        (
            {"latency": latency(), "candidates": WEIGHTS_ONLY, "pinned": {"4": LayerBits(3, 8)}},
            "layer '4' was not measured at 3/8",
        ),
        ({"latency": latency(input_shape=(3, 9, 9)), "candidates": WEIGHTS_ONLY}, "images of 3x9x9, and these have 3x8x8"),
        ({"latency": "table.json"}, r"latency: 'table.json' is no LatencyTable; read the file: LatencyTable.load"),
        ({"target": "openvino"}, "target: 'openvino' is no Target; take one of TARGETS"),
        ({"target": TARGETS["openvino"], "candidates": [LayerBits(4, 4)]}, "candidates: 4/4 .*target openvino"),
        ({"target": TARGETS["openvino"], "candidates": list(DEFAULT_CANDIDATES)}, "candidates: 2/2, .*target openvino"),
        ({"target": TARGETS["openvino"], "pinned": {"3": LayerBits(5, 8)}}, "pinned: layer '3': 5/8 .*target openvino"),
        ({"target": TARGETS["htp"], "pinned": {"3": LayerBits(4, 8)}}, "pinned: layer '3' at 4/8: target htp"),
        ({"target": TARGETS["htp"], "pinned": {"33": LayerBits(4, 8)}}, "pinned: the network has no layer '33'"),
    ],
)
def test_bits_that_were_not_measured_or_are_not_the_targets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        problem(**changes)


def test_a_profile_offers_what_its_target_stores_and_computes() -> None:
    stated = problem(budget="weight_bytes=0.9x", target=TARGETS["openvino"])
    assert [str(bits) for bits in stated.choices.candidates] == ["2/8", "3/8", "4/8", "6/8", "8/8"]
    assert problem(target=TARGETS["fpga-bitops"]).choices.candidates == DEFAULT_CANDIDATES
    assert problem(budget="weight_bytes=1x", target=TARGETS["openvino"], candidates=WEIGHTS_ONLY).choices.candidates == WEIGHTS_ONLY
    policy = Fisher(images=2).search(stated).policy
    assert all(TARGETS["openvino"].allows(bits) for bits in policy.layers.values())
    assert policy.provenance["target"] == "openvino"


def test_a_profile_pins_the_layers_that_keep_8_bits() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 40))
    stated = problem(model=wide, budget="weight_bytes=0.9x", target=TARGETS["htp"], pinned={})
    assert stated.choices.freedom.pinned == {"0": LayerBits(8, 8), "2": LayerBits(8, 8)}
    assert stated.free_layers == ("1", "4")
    assert replace(stated, seed=1).free_layers == ("1", "4")
    assert problem(model=wide, budget="weight_bytes=1x", target=TARGETS["htp"]).free_layers == ("1", "4")
    policy = Fisher(images=2).search(stated).policy
    assert policy.layers["0"] == policy.layers["2"] == LayerBits(8, 8) != policy.layers["4"]


@pytest.mark.parametrize(
    ("budget", "target", "warned"),
    [
        ("bitops=1x", "openvino", "a cap on bitops says nothing"),
        (("weight_bytes=1x", "mean_activation_bits=8"), "cortex-m", "a cap on mean_activation_bits says nothing"),
        ("weight_bytes=1x", "openvino", None),
        ("bitops=1x", "fpga-bitops", None),
    ],
)
def test_bitops_say_nothing_about_time_where_int8_is_what_runs(
    budget: Any, target: str, warned: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bitscape"):
        problem(budget=budget, target=TARGETS[target])
    assert [warned in line for line in caplog.messages] == [True] if warned else not caplog.messages
