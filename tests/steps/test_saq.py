import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitscape.engine import AdamW, Batch, Cosine, train
from bitscape.engine.step import CrossEntropy
from bitscape.errors import BitscapeError
from bitscape.models.attention import split_attention
from bitscape.quant.layers import quantized_layers
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact, PerTensor, Quantizer
from bitscape.sharpness import Ball
from bitscape.steps import Plain, Sam, Saq, SharpSettings
from tests.engine.tiny import same_state, tiny_batches
from tests.sharpness.small import batch, gradients, half_squared_error, quantized, regression, same, small_net, whole
from tests.steps.test_sam import one_step, used_by

SETTINGS = [Saq(case=case, rho=0.03) for case in (1, 2, 3)]
CASES = pytest.mark.parametrize("settings", SETTINGS, ids=["case 1", "case 2", "case 3"])
WORDS = ((1, "independent"), (2, "latent"), (3, "quantized"))
LAYERS = ("0", "4", "6")


def gradients_in(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Autograd's own: dL/d(tensor) with quantized weights ("<layer>.Q") put in as leaves."""
    free = {name: used_by(model)[name].requires_grad_() for name in names if name.endswith(".Q")}
    for name, leaf in free.items():
        model.get_submodule(name[:-2]).weight_quantizer.register_forward_hook(lambda *_, leaf=leaf: leaf)
    images, labels = batch()
    inputs = [free[name] if name in free else model.get_parameter(name) for name in names]
    return dict(zip(names, torch.autograd.grad(cross_entropy(model(images), labels), inputs), strict=True))


# What moves, and by how much.


@pytest.mark.parametrize(("settings", "weights"), [(Sam, "latent"), *((partial(Saq, case=case), word) for case, word in WORDS)])
def test_the_ball_is_that_of_the_settings(settings: Callable[..., SharpSettings], weights: str) -> None:
    assert settings().ball == Ball(weights=weights, norms=True, biases=True, clips=True, adaptive=False)
    given = {"norms": False, "biases": False, "clips": False, "adaptive": True}
    assert settings(**given, relative=False).ball == Ball(weights=weights, **given)


OTHERS = ["1.weight", "1.bias", "4.bias", "6.bias", *(f"{name}.input_quantizer.scale" for name in LAYERS)]


@CASES
def test_the_second_pass_sees_exactly_the_moved_tensors_and_all_comes_back(settings: Saq) -> None:
    model, measured = small_net(), ".Q" if settings.case == 3 else ".weight"
    before = copy.deepcopy(model.state_dict())
    by_hand = gradients_in(small_net(), ["0.bias", *OTHERS, *(f"{name}{measured}" for name in LAYERS)])
    record, first, second = one_step(settings, model)
    norm = torch.cat([g.flatten().double() for g in by_hand.values()]).norm()  # one over all
    assert float(record.extras["ascent_norm"]) == pytest.approx(float(norm), rel=1e-6)
    length = torch.cat([first[name].flatten().double() for name in by_hand]).norm()
    assert float(record.extras["rho"]) == pytest.approx(float(0.03 * length), rel=1e-6)

    factor = record.extras["rho"] / (record.extras["ascent_norm"] + 1e-12)
    expected = {**first, **{name: first[name] + factor * by_hand[name] for name in ("0.bias", *OTHERS)}}
    for name in LAYERS:
        e = factor * by_hand[f"{name}{measured}"]
        if settings.case == 2:
            expected[f"{name}.weight"] = first[f"{name}.weight"] + e
            expected[f"{name}.Q"] = model.get_submodule(name).weight_quantizer(expected[f"{name}.weight"]).detach()
        else:
            expected[f"{name}.Q"] = first[f"{name}.Q"] + e
    assert same(second, expected)  # scales of weights among them, which never move
    assert not any(torch.equal(second[name], first[name]) for name in OTHERS)

    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("1."))
    assert all(torch.equal(after[name], before[name]) for name in ("1.weight", "1.bias"))
    assert not any(layer.weight_quantizer._forward_hooks for layer in quantized_layers(model).values())


@CASES
def test_the_gradient_by_hand_in_a_regression(settings: Saq) -> None:
    # Q(w) of scale s and codes -4 .. 3; dL/dw of half the squared error is (x q' + b - y)' x / n where w is in the grid's range.
    model, x, _, bias = regression()
    assert bias is not None
    layer, labels = model[1], batch()[1]
    w, b, y, n = layer.weight.detach().clone(), bias.detach().clone(), labels[:, None], len(x)
    layer.weight_quantizer.scale.data.mul_(0.6)  # so that some weights are out of range
    s = layer.weight_quantizer.scale.detach().clone()
    q = s * (w / s).round().clamp(-4, 3)

    def slopes(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        error = x @ weight.T + bias - y
        return error.T @ x / n, error.mean(0)

    def inside(weight: Tensor) -> Tensor:
        return (weight >= -4 * s) & (weight <= 3 * s)

    assert 0 < int((~inside(w)).sum()) < 100
    g, g_b = slopes(q, b)
    g = g if settings.case == 3 else g * inside(w)
    factor = 0.5 / math.hypot(float(g.norm()), float(g_b.norm()))
    latent = w + factor * g if settings.case == 2 else w
    on_grid = s * (latent / s).round().clamp(-4, 3)
    at, at_b = slopes(on_grid if settings.case == 2 else on_grid + factor * g, b + factor * g_b)

    one_step(replace(settings, rho=0.5, relative=False, clips=False), model, half_squared_error)
    torch.testing.assert_close(layer.weight.grad, at * inside(latent))
    torch.testing.assert_close(bias.grad, at_b)
    # LSQ's own slope of the scale, Eq. 3 and 5: 216 weights share it, qmax is 3.
    per_weight = torch.where(inside(latent), (on_grid - latent) / s, on_grid / s)
    torch.testing.assert_close(layer.weight_quantizer.scale.grad, (at * per_weight).sum() / math.sqrt(216 * 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_small_perturbation_changes_few_codes_in_case_2_and_none_in_case_3(bits: int) -> None:
    def wide() -> nn.Module:
        torch.manual_seed(0)
        return quantized(nn.Sequential(nn.Flatten(), nn.Linear(72, 200)), bits=bits, quantizer=Lsq(weight_scales=PerTensor()))

    model = wide()
    scale, low, high = model[1].weight_quantizer.scale.item(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    _, first, second = one_step(Saq(case=2, rho=0.002), model)
    changes = ((second["1.Q"] - first["1.Q"]) / scale).round()
    steps = [(each["1.weight"] / scale).round().clamp(low, high) for each in (first, second)]
    assert torch.equal(changes, steps[1] - steps[0])
    flips, weights = int((changes != 0).sum()), changes.numel()
    assert set(changes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    # Latent weights are spread evenly: one of them crosses an edge with the chance |e| / scale.
    inside = (first["1.weight"] / scale > low - 0.5) & (first["1.weight"] / scale < high + 0.5)
    chance = float(((second["1.weight"] - first["1.weight"]).abs() * inside).sum()) / scale
    assert 0 < flips < 0.01 * weights and flips == pytest.approx(chance, abs=4 * math.sqrt(chance))

    model = wide()
    codes = model[1].weight_quantizer.codes(model[1].weight).q
    _, first, second = one_step(Saq(rho=0.002), model)
    assert torch.equal(first["1.weight"], second["1.weight"])
    assert torch.equal(model[1].weight_quantizer.codes(second["1.weight"]).q, codes)
    moved = second["1.Q"] - first["1.Q"]
    assert float((moved != 0).float().mean()) > 0.9 and float(moved.abs().max()) < 0.5 * scale


def test_case_2_is_sam() -> None:
    one, other = small_net(dropout=0.2), small_net(dropout=0.2)
    for model, settings in ((one, Saq(case=2, rho=0.03)), (other, Sam(rho=0.03))):
        torch.manual_seed(0)
        settings.build()(model, whole(*batch()))
    assert same(gradients(one), gradients(other))


# Other quantizers, optimizers and networks.


@CASES
@pytest.mark.parametrize("quantizer", [Pact(), Dorefa(), Liq(), Liq(restore_scale=False), LsqPlus()], ids=str)
def test_the_update_starts_from_the_unperturbed_weights_with_every_quantizer(settings: Saq, quantizer: Quantizer) -> None:
    batches = tiny_batches(images=16)
    images, labels = next(iter(batches.epoch(0)))
    model, twin = (quantized(small_float(), quantizer=quantizer, images=images) for _ in range(2))
    before = used_by(twin)
    settings.build()(twin, whole(images, labels))
    assert same(used_by(twin), before)
    assert not same(gradients(twin), plain_gradients(twin, images, labels))
    AdamW(lr=0.01).build(twin).step()
    train(model, batches, step=settings, optimizer=AdamW(lr=0.01), epochs=1, schedule=Cosine(), channels_last=False)
    assert same(used_by(model), used_by(twin))


def small_float() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def plain_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    twin = copy.deepcopy(model)
    twin.zero_grad()
    Plain()(twin, whole(images, labels))
    return gradients(twin)


class SmallVit(nn.Module):
    """Patches, one encoder layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 8, 3, 3)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(x).flatten(2).mT).mean(1))
        return logits


def test_a_transformer_without_norms_and_clips() -> None:
    torch.manual_seed(0)
    model = quantized(split_attention(SmallVit()), bits=4)
    model.train()
    before = copy.deepcopy(model)
    layers = ["embed", *(f"encoder.self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "encoder.linear1", "encoder.linear2", "head"]
    record, first, second = one_step(Saq(rho=0.003, norms=False, clips=False), model)
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    # A key's bias adds the same to every score of a row: its slope is a rounding error.
    bias = "encoder.self_attn.k_proj.bias"
    assert moved - {bias} == {f"{name}{part}" for name in layers for part in (".Q", ".bias")} - {bias}
    assert same_state(model, before)
    assert float(record.extras["gap"]) > 0 and float(record.extras["gap_of_predicted"]) == pytest.approx(1, abs=0.5)
    _, first, second = one_step(Saq(rho=0.003), model)
    also = {name for name in first if not torch.equal(first[name], second[name])} - moved
    norms = {f"encoder.norm{number}.{part}" for number in (1, 2) for part in ("weight", "bias")}
    assert also - {bias} == norms | {f"{name}.input_quantizer.scale" for name in layers}


def test_a_batch_in_parts_leaves_the_weights_bit_for_bit() -> None:
    model = small_net(norm=False)
    before = copy.deepcopy(model)
    Saq(rho=0.1).build()(model, Batch.of(*batch(), CrossEntropy(), 4))
    assert same_state(model, before)


@pytest.mark.parametrize("wrong", [lambda: Saq(case=0), lambda: Saq(case=4)])
def test_a_wrong_case_is_explained(wrong: Callable[[], Saq]) -> None:
    with pytest.raises(BitscapeError, match=r"case = [04]: 1, 2 or 3; 3 is the method"):
        wrong()
    with pytest.raises(BitscapeError, match="rho = -1"):
        Saq(case=3, rho=-1)
