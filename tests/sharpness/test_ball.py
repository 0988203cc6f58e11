import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitscape.engine.forward import as_logits, loop_forward
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import bypassed, with_quantizers
from bitscape.quant.layers import quantized_layers
from bitscape.quant.mixture import mix
from bitscape.quant.quantizers import Liq, Lsq, Pact, PerTensor
from bitscape.sharpness.ball import Ball
from tests.sharpness.small import batch, float_net, gradients, quantized, same, small_net

pytestmark = pytest.mark.slow

WEIGHTS = {"0.weight", "4.weight", "6.weight"}
DEFAULT = Ball()
BIASES = {"0.bias", "4.bias", "6.bias"}
NORM = {"1.weight", "1.bias"}


def first_pass(model, ball=DEFAULT, data=None):
    images, labels = data or batch()
    with ball.watched(model) as ascent:
        value = cross_entropy(model(images), labels)
        value.backward()
    return ascent, value.detach()


def second_pass(model, data=None):
    """Loss and gradients with what is moved at present."""
    images, labels = data or batch()
    model.zero_grad()
    value = cross_entropy(model(images), labels)
    value.backward()
    return value.detach(), gradients(model)


def seen_weights(model, run):
    """Layer -> list of weights that reach its convolution or product while `run` runs."""
    seen = {}
    handles = [
        # Registered last, so that it sees what the layer gets.
        layer.weight_quantizer.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out.detach().clone()))
        for name, layer in quantized_layers(model).items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


# The ball's members.


@pytest.mark.parametrize("quantizer", [Lsq(), Pact(), Liq()])
def test_switches_choose_the_members_and_scales_of_weights_are_never_among_them(quantizer):
    model = small_net(quantizer=quantizer)
    clip = "clip" if isinstance(quantizer, Pact) else "scale"
    clips = {f"{name}.input_quantizer.{clip}" for name in ("0", "4", "6")}
    assert set(Ball().members(model)) == WEIGHTS | BIASES | NORM
    assert set(Ball(norms=False).members(model)) == WEIGHTS | BIASES
    assert set(Ball(biases=False).members(model)) == WEIGHTS | NORM
    assert set(Ball(weights="latent", norms=False, biases=False).members(model)) == WEIGHTS
    assert set(Ball(clips=True).members(model)) == WEIGHTS | BIASES | NORM | clips


def test_frozen_parameters_are_no_members():
    model = small_net()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert set(Ball().members(model)) == (WEIGHTS | BIASES | NORM) - {"0.weight", "1.bias"}


def test_logits_of_a_mixture_are_no_members():
    model = mix(float_net(), (2, 4), (2, 4), [["4"]], {"0": LayerBits(8, 8), "6": LayerBits(8, 8)})
    assert not [name for name in Ball(clips=True).members(model) if "logits" in name]
    assert "4.input_quantizer.scale" in Ball(clips=True).members(model)


def test_layers_without_quantizer_are_moved_themselves():
    model = float_net()
    ascent, _ = first_pass(model)
    assert same(ascent.gradients, gradients(model))


# What the first pass sees.


def test_the_gradient_is_that_in_the_quantized_weight():
    model = small_net()
    ascent, _ = first_pass(model)
    free = {name: layer.weight_quantizer(layer.weight).detach().requires_grad_() for name, layer in quantized_layers(model).items()}
    for name, layer in quantized_layers(model).items():
        layer.weight_quantizer.register_forward_hook(lambda _m, _i, _out, name=name: free[name])
    images, labels = batch()
    inputs = [*free.values(), *(dict(model.named_parameters())[name] for name in sorted(BIASES | NORM))]
    by_hand = torch.autograd.grad(cross_entropy(model(images), labels), inputs)
    names = [*(f"{name}.weight" for name in free), *sorted(BIASES | NORM)]
    assert same(ascent.gradients, dict(zip(names, by_hand, strict=True)))
    assert same({f"{name}.weight": w for name, w in free.items()}, {n: v for n, v in ascent.values().items() if n in WEIGHTS})
    total = torch.cat([g.flatten() for g in by_hand]).double().norm()
    assert float(ascent.norm) == pytest.approx(float(total), rel=1e-6)
    assert ascent.norm.shape == ()


def test_watching_changes_neither_the_loss_nor_the_gradients():
    model, twin = small_net(), small_net()
    _, value = first_pass(model)
    plain, expected = second_pass(twin)
    assert torch.equal(value, plain) and same(gradients(model), expected)
    assert not any(layer.weight_quantizer._forward_hooks or layer._forward_pre_hooks for layer in quantized_layers(model).values())


def test_a_gradient_left_over_from_before_is_not_counted():
    model, twin = small_net(), small_net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert same(first_pass(model)[0].gradients, first_pass(twin)[0].gradients)


def test_two_half_batches_accumulate_to_the_whole():
    images, labels = batch()
    model = small_net(norm=False)
    whole, _ = first_pass(model)
    with Ball().watched(model) as halves:
        for rows in (slice(0, 6), slice(6, 12)):
            (cross_entropy(model(images[rows]), labels[rows]) / 2).backward()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(halves.gradients[name], gradient)
    torch.testing.assert_close(halves.norm, whole.norm)


class Twice(nn.Module):
    """A layer that runs twice, and one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.tied = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(72, 3)

    def forward(self, x):
        x = self.first(self.first(x).relu()).relu()
        return self.head(self.tied(x).flatten(1))


def test_runs_and_layers_that_share_a_weight_share_one_member():
    torch.manual_seed(0)
    model = quantized(Twice())
    quantizer = model.first.weight_quantizer
    assert model.tied.weight_quantizer is quantizer
    ascent, _ = first_pass(model)
    assert set(ascent.gradients) == {"first.weight", "first.bias", "head.weight", "head.bias"}
    free = quantizer(model.first.weight).detach().requires_grad_()
    quantizer.register_forward_hook(lambda *_: free)
    (expected,) = torch.autograd.grad(cross_entropy(model(batch()[0]), batch()[1]), free)
    torch.testing.assert_close(ascent.gradients["first.weight"], expected)


def test_a_bypassed_quantizer_of_a_layer_that_runs_twice_counts_each_run_once():
    torch.manual_seed(0)
    model = with_quantizers(Twice(), Policy(dict.fromkeys(("first", "tied", "head"), LayerBits(4, 4))))
    with bypassed(model):
        ascent, _ = first_pass(model, Ball(biases=False))
    # Bypassed layers have a stand-in each: the uses of the one weight are two members.
    together = ascent.gradients["first.weight"] + ascent.gradients["tied.weight"]
    torch.testing.assert_close(together, model.first.weight.grad)


def test_a_pass_without_gradients_is_an_error():
    with pytest.raises(BitscapeError, match=r"none of the 8 members .*backward"), Ball().watched(small_net()):
        pass


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    images, labels = batch()
    model = small_net()
    images[0, 0, 0, 0] = torch.nan
    ascent, _ = first_pass(model, data=(images, labels))
    assert not ascent.norm.isfinite()


# The second pass.


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_second_pass_sees_exactly_the_moved_tensors(as_tensor):
    model = small_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantized_before = {name: layer.weight_quantizer(layer.weight).detach() for name, layer in quantized_layers(model).items()}
    ascent, _ = first_pass(model)
    factor = torch.tensor(0.3) if as_tensor else 0.3
    with ascent.applied(factor):
        seen = seen_weights(model, lambda: second_pass(model))
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, weight in quantized_before.items():
        assert len(seen[name]) == 1
        assert torch.equal(seen[name][0], weight + 0.3 * ascent.gradients[f"{name}.weight"])
    for name in before:
        moved = name in BIASES | NORM
        assert torch.equal(now[name], before[name] + 0.3 * ascent.gradients[name] if moved else before[name])
    assert same(before, dict(model.named_parameters()))


def test_a_shared_layer_is_moved_alike_at_every_use():
    torch.manual_seed(0)
    model = quantized(Twice())
    ascent, _ = first_pass(model)
    expected = model.first.weight_quantizer(model.first.weight) + 0.5 * ascent.gradients["first.weight"]
    uses = []
    with ascent.applied(0.5):
        model.first.weight_quantizer.register_forward_hook(lambda _m, _i, out: uses.append(out.detach()))
        second_pass(model)
    assert len(uses) == 3 and all(torch.equal(use, expected) for use in uses)


@pytest.mark.parametrize("weights", ["quantized", "latent", "independent"])
def test_everything_is_restored_bit_for_bit_also_after_an_error(weights):
    model = small_net()
    ascent, value = first_pass(model, Ball(weights=weights, clips=True))
    before = copy.deepcopy(model.state_dict())
    for fails in (False, True):
        try:
            with ascent.applied(0.7):
                moved, _ = second_pass(model.eval())
                model.train()
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        own = {n: v for n, v in model.state_dict().items() if not n.startswith("1.running")}
        assert all(torch.equal(before[name], now) for name, now in own.items())
        assert not any(layer.weight_quantizer._forward_hooks for layer in quantized_layers(model).values())
    assert torch.equal(second_pass(model)[0], value) and not torch.equal(moved, value)


@pytest.mark.parametrize("weights", ["quantized", "latent", "independent"])
def test_factor_0_repeats_loss_and_gradients(weights):
    model = small_net()
    ascent, value = first_pass(model, Ball(weights=weights))
    expected = gradients(model)
    with ascent.applied(0.0):
        again, repeated = second_pass(model)
    assert torch.equal(again, value) and same(repeated, expected)


def test_the_latent_gradient_is_the_straight_through_image_at_the_moved_weight():
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=False)), bits=2, quantizer=Lsq(weight_scales=PerTensor()))
    layer, (images, labels) = model[1], batch()
    layer.weight_quantizer.scale.data.fill_(0.05)
    ascent, _ = first_pass(model)
    with ascent.applied(0.4):
        _, found = second_pass(model)
    # By hand: softmax regression on the quantized input, at Q(w) + e.
    x, w = layer.input_quantizer(images.flatten(1)).detach(), layer.weight.detach()
    q = 0.05 * (w / 0.05).round().clamp(-2, 1)
    onehot = nn.functional.one_hot(labels, 3)
    g = ((x @ q.T).softmax(1) - onehot).T @ x / len(x)
    torch.testing.assert_close(ascent.gradients["1.weight"], g)
    at_moved = ((x @ (q + 0.4 * g).T).softmax(1) - onehot).T @ x / len(x)
    inside = (w >= -0.1) & (w <= 0.05)
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(found["1.weight"], at_moved * inside)
    assert not torch.allclose(at_moved * inside, g * inside, atol=1e-3)


def test_the_usual_factor_gives_a_move_of_length_rho():
    model = small_net()
    ascent, _ = first_pass(model)
    steps = [float(ascent.factor(0.3)) * g for g in ascent.gradients.values()]
    assert float(torch.cat([s.flatten() for s in steps]).norm()) == pytest.approx(0.3, rel=1e-5)


def test_the_move_raises_the_loss_by_rho_times_the_norm_to_first_order():
    model = small_net()
    with bypassed(model, "input_quantizer"):
        ascent, value = first_pass(model)
        rho = 1e-3
        with ascent.applied(ascent.factor(rho)):
            moved, _ = second_pass(model)
    assert float((moved - value) / (rho * ascent.norm)) == pytest.approx(1, abs=0.02)


def test_asam_by_hand():
    model = small_net()
    plain, _ = first_pass(model)
    ascent, _ = first_pass(small_net(), Ball(adaptive=True))
    assert same(plain.gradients, ascent.gradients)
    sizes = {name: value.abs() + 0.01 if name.endswith("weight") else torch.ones_like(value) for name, value in plain.values().items()}
    scaled = torch.cat([(sizes[name] * g).flatten() for name, g in plain.gradients.items()])
    assert float(ascent.norm) == pytest.approx(float(scaled.double().norm()), rel=1e-6)
    model = ascent._model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with ascent.applied(0.2):
        seen = seen_weights(model, lambda: second_pass(model))
        for name in BIASES | NORM:
            step = 0.2 * (sizes[name] ** 2 * plain.gradients[name])
            torch.testing.assert_close(model.get_parameter(name).detach(), before[name] + step)
    for name in WEIGHTS:
        step = 0.2 * (sizes[name] ** 2 * plain.gradients[name])
        torch.testing.assert_close(seen[name.removesuffix(".weight")][0], plain.values()[name] + step)


def test_case_1_and_case_2_of_the_paper():
    model = small_net()
    g = gradients_of_plain_pass(model)
    # Case 2: the latent weight moves, and the quantizer sees it.
    ascent, _ = first_pass(model, Ball(weights="latent"))
    assert torch.equal(ascent.gradients["0.weight"], g["0.weight"])
    with ascent.applied(0.2):
        seen = seen_weights(model, lambda: second_pass(model))
        assert torch.equal(seen["0"][0], model[0].weight_quantizer(model[0].weight))
    # Case 1: the quantized weight moves by the latent gradient.
    ascent, _ = first_pass(model, Ball(weights="independent"))
    with ascent.applied(0.2):
        seen = seen_weights(model, lambda: second_pass(model))
    assert torch.equal(seen["0"][0], model[0].weight_quantizer(model[0].weight) + 0.2 * g["0.weight"])


def gradients_of_plain_pass(model):
    return second_pass(model)[1]


# Inside the loop's forward.


def test_a_compiled_network_is_watched_and_moved_like_an_uncompiled_one():
    model, twin = small_net(), small_net()
    model.forward = torch.compile(model.forward, backend="eager")
    second_pass(model)
    second_pass(twin)
    found, _ = first_pass(model)
    expected, _ = first_pass(twin)
    assert same(found.gradients, expected.gradients)
    with found.applied(0.3):
        moved, _ = second_pass(model)
    with expected.applied(0.3):
        assert torch.equal(moved, second_pass(twin)[0])


def test_autocast_does_not_erase_the_move():
    model = small_net(norm=False)

    def read(output: object, samples: int) -> torch.Tensor:
        return as_logits(output, samples, highest_label=2)

    with bypassed(model, "input_quantizer"), loop_forward(model, autocast=torch.bfloat16, compiled=False, read=read):
        ascent, value = first_pass(model, Ball(biases=False))
        rho = 1e-3
        with ascent.applied(ascent.factor(rho)):
            moved, _ = second_pass(model)
    assert float((moved - value) / (rho * ascent.norm)) == pytest.approx(1, abs=0.02)


def test_autocast_goes_on_between_the_layers_and_after_an_error():
    images, _ = batch()
    model = small_net(norm=False)
    ascent, _ = first_pass(model)
    inputs = []
    model[4].register_forward_pre_hook(lambda _m, args: inputs.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with ascent.applied(0.0), Ball().watched(model):
            with pytest.raises(RuntimeError):
                model(images[:, :1])
            assert torch.is_autocast_enabled("cpu")
            model(images).sum().backward()
            assert torch.is_autocast_enabled("cpu")
        assert model(images).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert inputs == [torch.float32, torch.bfloat16]
