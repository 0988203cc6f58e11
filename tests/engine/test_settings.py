import itertools
import math

import pytest
import torch
from torch import nn

from bitscape.engine import AdamW, Cosine, Sgd
from bitscape.errors import BitscapeError
from tests.engine.tiny import ScaleQuantizer, tiny_net


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


@pytest.mark.parametrize("settings", [Sgd(weight_decay=0.3, quantizer_lr=0.5), AdamW(weight_decay=0.3, quantizer_lr=0.5)])
def test_only_weights_decay_and_quantizers_have_their_own_rate(settings: Sgd | AdamW) -> None:
    model = tiny_net()
    optimizer = settings.build(model)
    assert names_by_group(model, optimizer) == {
        "weights": {"0.weight", "4.weight", "7.weight"},
        "vectors": {"1.weight", "1.bias", "4.bias", "7.bias"},
        "quantizers": {"3.scale"},
    }
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert [by_name[name]["weight_decay"] for name in ("weights", "vectors", "quantizers")] == [0.3, 0.0, 0.0]
    assert [by_name[name]["lr"] for name in ("weights", "vectors", "quantizers")] == [settings.lr, settings.lr, 0.5]


def test_a_matrix_inside_a_quantizer_is_the_quantizers() -> None:
    quantizer = ScaleQuantizer()
    quantizer.table = nn.Linear(2, 2)
    model = nn.Sequential(quantizer)
    assert names_by_group(model, Sgd().build(model)) == {"quantizers": {"0.scale", "0.table.weight", "0.table.bias"}}


def test_frozen_parameters_are_left_out_and_a_frozen_model_refused() -> None:
    model = tiny_net()
    model[0].requires_grad_(False)
    assert names_by_group(model, Sgd().build(model))["weights"] == {"4.weight", "7.weight"}
    with pytest.raises(BitscapeError, match="no trainable parameter"):
        Sgd().build(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (Sgd, {"lr": 0.0}, "lr is 0.0"),
        (Sgd, {"lr": math.nan}, "lr is nan"),
        (Sgd, {"lr": 1e308}, r"lr is 1e\+308; it must be > 0 and at most 1e\+06"),
        (Sgd, {"weight_decay": 1e39}, r"weight_decay is 1e\+39; it must be from 0 to 1e\+06"),
        (AdamW, {"eps": math.inf}, "eps is inf"),
        (Sgd, {"momentum": 1.0}, "momentum is 1.0"),
        (Sgd, {"momentum": 0.0}, "nesterov=False"),
        (Sgd, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (AdamW, {"quantizer_lr": -1.0}, "quantizer_lr is -1.0"),
        (AdamW, {"beta2": 1.0}, "beta2 is 1.0"),
        (AdamW, {"eps": 0.0}, "eps is 0.0"),
        (Cosine, {"warmup_epochs": -1.0}, "warmup_epochs is -1.0"),
        (Cosine, {"final": 1.5}, "final is 1.5"),
    ],
)
def test_wrong_values_are_named(kind: type, wrong: dict[str, float], message: str) -> None:
    with pytest.raises(BitscapeError, match=message):
        kind(**wrong)


def test_cosine_rises_then_falls_to_its_final_share() -> None:
    schedule = Cosine(warmup_epochs=0.5, final=0.1)
    factors = [schedule.factor(step, steps=100, steps_per_epoch=10) for step in range(101)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert all(earlier > later for earlier, later in itertools.pairwise(factors[5:]))
    assert factors[100] == pytest.approx(0.1)
    assert Cosine().factor(9, steps=10, steps_per_epoch=10) == pytest.approx(0.0245, abs=1e-4)  # the last step still moves
    assert Cosine().factor(50, steps=100, steps_per_epoch=10) == pytest.approx(0.5)


def test_a_warmup_longer_than_the_run_never_reaches_the_top() -> None:
    factors = [Cosine(warmup_epochs=9.0).factor(step, steps=4, steps_per_epoch=2) for step in range(4)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_updates_are_skipped_by_the_flag_the_loop_sets(kind: type[torch.optim.Optimizer]) -> None:
    # The loop relies on this on GPUs, where it does not read the loss of each step.
    weight = nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1, fused=True)
    weight.grad = torch.full((3,), math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))
    weight.grad, optimizer.found_inf = torch.ones(3), torch.tensor(0.0)
    optimizer.step()
    assert bool((weight < 1.0).all())
