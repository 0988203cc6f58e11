import copy
import logging
import weakref

import pytest
import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from bitscape.models.modes import evaluating
from bitscape.nested import tensors_in
from bitscape.policy import LayerBits, Policy, PolicyError, uniform_policy
from bitscape.quant.convert import bypassed, calibrate, recalibrate_norms, record_inputs, with_quantizers, without_single_samples
from bitscape.quant.layers import quantized_layers, static_bits
from bitscape.quant.observers import MinMax
from bitscape.quant.quantizers import Dorefa, Liq, Lsq, LsqPlus, Pact
from bitscape.quant.repair import correct_biases, input_moments
from tests.networks import CALLED, drawn

QUANTIZERS = [Lsq(), LsqPlus(), Pact(), Dorefa(), Liq()]


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def images(n: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


FOUR = LayerBits(4, 4)


def policy(model: nn.Module, bits: LayerBits = FOUR) -> Policy:
    return uniform_policy(layer_shapes(model), bits)


def quantized(**settings) -> nn.Module:
    model = small_net()
    return with_quantizers(model, policy(model), **settings)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_a_float_checkpoint_loads_into_the_quantized_network():
    source = small_net()
    with torch.no_grad():
        source[0].weight.mul_(2)
    model = quantized()
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("quantizer" in key for key in result.missing_keys)
    assert torch.equal(model[0].weight, source[0].weight)


def test_the_float_network_is_copied_unless_in_place():
    model = small_net()
    assert with_quantizers(model, policy(model)) is not model
    assert not quantized_layers(model)
    assert with_quantizers(model, policy(model), inplace=True) is model
    assert set(quantized_layers(model)) == {"0", "3", "9"}


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_8_bits_change_little(quantizer):
    model = small_net().eval()
    x = images()
    q = calibrate(with_quantizers(model, policy(model, LayerBits(8, 8)), quantizer), x)
    if isinstance(quantizer, Liq):  # leaves out the mean of the weights
        with torch.no_grad():
            for layer in (model[0], model[3], model[9]):
                layer.weight -= layer.weight.mean()
    with torch.no_grad():
        error = (q(x) - model(x)).square().mean() / model(x).var()
    assert error < 0.02


def test_every_layer_gets_the_bits_of_the_policy():
    layers = {"0": LayerBits(8, 7), "3": LayerBits(1, 2), "9": LayerBits(5, 6)}
    model = with_quantizers(small_net(), Policy(layers))
    assert {name: static_bits(layer) for name, layer in quantized_layers(model).items()} == layers


def test_hooks_and_shared_references_stay():
    model = small_net()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    first = model[0]
    with_quantizers(model, policy(model), inplace=True)
    assert model[0] is first
    with bypassed(model):
        model(images(2))
    assert calls == [1]


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    q = calibrate(with_quantizers(model, policy(model)), torch.randn(8, 6))
    assert q[0] is q[2]
    assert q(torch.randn(2, 6)).shape == (2, 6)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    q = calibrate(with_quantizers(model, policy(model)), torch.randn(8, 6))
    assert q[0].weight is q[1].weight
    q(torch.randn(2, 6)).sum().backward()
    assert q[0].weight_quantizer is q[1].weight_quantizer  # else training would pull their codes apart
    assert len(list(q.parameters())) == 1 + 1 + 2 * 2


def test_projections_of_attention_are_quantized():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    names = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["linear1", "linear2"]
    x = torch.randn(4, 5, 8)
    q = calibrate(with_quantizers(model, Policy(dict.fromkeys(names, LayerBits(8, 8)))), x)
    assert set(quantized_layers(q)) == set(names)
    assert all(layer.input_quantizer.initialized for layer in quantized_layers(q).values())
    with torch.no_grad():
        assert 0 < (q(x) - model(x)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.update({"30": layers["3"]}), "no layer '30'; nearest: 3"),
        (lambda layers: layers.pop("3"), "gives no bits for '3'"),
    ],
)
def test_a_policy_of_another_network_is_an_error(change, message):
    layers = dict(policy(small_net()).layers)
    change(layers)
    with pytest.raises(PolicyError, match=message):
        with_quantizers(small_net(), Policy(layers))


def test_a_quantized_network_is_an_error():
    model = quantized()
    with pytest.raises(BitscapeError, match="quantized already"):
        with_quantizers(model, policy(model))


def test_weights_of_nan_are_an_error_with_the_layers_name():
    model = small_net()
    model[3].weight.data[0] = float("nan")
    with pytest.raises(BitscapeError, match="layer 3, weight: 9 of 72 values are NaN"):
        with_quantizers(model, policy(model))


def test_inputs_of_nan_are_an_error_with_the_layers_name():
    x = images()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(BitscapeError, match=r"layer 0, input: .* values are NaN or infinite"):
        calibrate(quantized(), x)


def test_calibrating_a_network_that_uses_a_weight_elsewhere_too_is_an_error():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(12, 4), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(nn.functional.linear(self.encoder(x), self.encoder.weight.t()))

    model = Tied()
    network = with_quantizers(model, policy(model))
    before = snapshot(network)
    with pytest.raises(BitscapeError, match="the weight of layer 'encoder' is used outside of the layer too"):
        calibrate(network, torch.randn(8, 12))
    assert not changed(before, network)


def test_batches_that_come_once_all_count():
    whole, parts = (calibrate(quantized(observer=MinMax()), given, MinMax()) for given in (images(), iter(images().split(20))))
    assert not changed(snapshot(whole), parts)


def test_calling_before_calibrate_is_an_error():
    with pytest.raises(BitscapeError, match=r"call bitscape\.quantize"):
        quantized()(images(2))


@pytest.mark.parametrize("names", [(), ("weight_quantizer",), ("input_quantizer",)])
def test_bypassed_restores_also_after_an_exception(names):
    model = calibrate(quantized(), images()).eval()
    before, keys, x = dict(model.named_modules()), list(model.state_dict()), images(4)
    y = model(x)
    with pytest.raises(RuntimeError, match="inside"), bypassed(model, *names):
        assert not torch.equal(model(x), y)
        raise RuntimeError("inside")
    assert dict(model.named_modules()) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), y)


def test_evaluating_restores_each_modules_mode_also_after_an_exception():
    model = small_net().train()
    model[1].eval()
    before = modes(model)
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(modes(model)) and not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert modes(model) == before and torch.is_grad_enabled()


def test_calibrate_sets_input_ranges_and_nothing_else():
    model = quantized().train()
    model[4].eval()
    before, mode = snapshot(model), modes(model)
    assert calibrate(model, images()) is model
    assert all(".input_quantizer." in key for key in changed(before, model))
    assert modes(model) == mode
    assert [layer.input_quantizer.signed for layer in quantized_layers(model).values()] == [True, False, False]


def test_ranges_are_those_of_the_float_network():
    model, x = small_net().eval(), images()
    q = calibrate(with_quantizers(model, policy(model)), x, MinMax())
    with torch.no_grad():
        assert q[3].input_quantizer.scale.item() == pytest.approx(model[:3](x).max().item() / 15)
        assert q[9].input_quantizer.scale.item() == pytest.approx(model[:9](x).max().item() / 15)


def test_batches_and_a_tensor_give_the_same_ranges():
    whole, parts = calibrate(quantized(), images()), calibrate(quantized(), images().split(32))
    assert not changed(snapshot(whole), parts)


def test_calibrating_again_starts_anew():
    model = calibrate(quantized(), images())
    once = snapshot(model)
    calibrate(model, images() * 3)
    assert changed(once, model)
    calibrate(model, images())
    assert not changed(once, model)


def test_calibrate_leaves_everything_after_an_exception():
    model = quantized().train()
    before, mode, hooks = dict(model.named_modules()), modes(model), [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(BitscapeError):
        calibrate(model, torch.zeros(2, 5, 8, 8))
    assert dict(model.named_modules()) == before
    assert (modes(model), [len(m._forward_pre_hooks) for m in model.modules()]) == (mode, hooks)


def test_calibrate_needs_a_quantized_network():
    with pytest.raises(BitscapeError, match="no quantized layer"):
        calibrate(small_net(), images())


def test_a_layer_that_never_ran_is_named(caplog):
    model = small_net()
    model[7].unused = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, "bitscape.quant"):
        q = calibrate(with_quantizers(model, policy(model)), images())
    assert "layer 7.unused never ran" in caplog.text
    assert not q[7].unused.input_quantizer.initialized


def test_norms_get_the_plain_average_over_batches():
    model = calibrate(quantized(), images()).train()
    model[4].eval()
    before, mode, momenta = snapshot(model), modes(model), [model[i].momentum for i in (1, 4)]
    x = images(64, seed=5)
    recalibrate_norms(model, x.split(16))
    assert changed(before, model) == {f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert (modes(model), [model[i].momentum for i in (1, 4)]) == (mode, momenta)
    with torch.no_grad():
        outputs = [model[0](part) for part in x.split(16)]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, variances, rtol=1e-4, atol=1e-5)


def test_norms_keep_modes_and_momenta_after_an_exception():
    model = calibrate(quantized(), images()).train()
    mode = modes(model)
    with pytest.raises(BitscapeError):
        recalibrate_norms(model, torch.zeros(2, 5, 8, 8))
    assert modes(model) == mode
    assert [model[i].momentum for i in (1, 4)] == [0.1, 0.1]


def test_a_network_without_norms_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    before = snapshot(model)
    recalibrate_norms(model, torch.randn(4, 3))
    assert not changed(before, model)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_copies_and_state_dicts_carry_the_network(quantizer):
    model = calibrate(quantized(quantizer=quantizer), images()).eval()
    x = images(4)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    fresh = quantized(quantizer=quantizer).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_a_few_steps_of_training_lower_the_loss(quantizer):
    model = calibrate(quantized(quantizer=quantizer), images()).eval()  # eval: without dropout
    x, target = images(), torch.arange(48) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_norms_that_never_run_keep_their_statistics(caplog):
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.spare.running_mean.fill_(3.0)

        def forward(self, x):
            return self.used(x)

    model = Spare()
    with caplog.at_level(logging.WARNING):
        recalibrate_norms(model, torch.randn(64, 3) + 1)
    assert model.spare.running_mean.tolist() == [3.0] * 3 and "never ran" in caplog.text
    assert (model.used.running_mean - 1).abs().max() < 0.5


def test_no_images_leave_norms_as_they_were():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean.fill_(2.0)
    with pytest.raises(BitscapeError, match="no batch"):
        recalibrate_norms(model, [])
    assert model[0].running_mean.tolist() == [2.0] * 3


def test_an_error_in_place_leaves_no_layer_quantized():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(BitscapeError, match="layer 1, weight"):
        with_quantizers(model, policy(model), inplace=True)
    assert not quantized_layers(model)


def test_batches_with_labels_are_no_images():
    model = with_quantizers(nn.Sequential(nn.Linear(3, 3)), policy(nn.Sequential(nn.Linear(3, 3))))
    with pytest.raises(BitscapeError, match=r"takes 2 positional arguments but 3 were given; a tuple .* labels are neither"):
        calibrate(model, iter([(torch.randn(2, 3), torch.tensor([0, 1]))]))


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [([], []), ([1], [1]), ([4], [4]), ([4, 1], [5]), ([4, 4, 1], [4, 5]), ([1, 4], [5]), ([1] * 5, [2, 3]), ([4, 1, 2, 1], [4, 4])],
)
def test_a_batch_of_one_image_joins_its_neighbor(sizes, joined):
    x = torch.arange(sum(sizes))
    batches = list(without_single_samples(x.split(sizes)))
    assert [len(batch) for batch in batches] == joined
    assert torch.equal(torch.cat([x[:0], *batches]), x)


def pixel_net() -> nn.Sequential:
    """A norm on maps of one pixel."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_the_norm_of_a_pixel_is_recalibrated_whatever_is_left_for_the_last_batch():
    x = images(129)
    by_tensor, by_batches = pixel_net(), pixel_net()
    by_batches.load_state_dict(by_tensor.state_dict())
    recalibrate_norms(by_tensor, x)
    recalibrate_norms(by_batches, x.split(32))
    with torch.no_grad():
        pixels = by_tensor[:2](x)[:, :, 0, 0]
        last = pixels[96:]
    torch.testing.assert_close(by_tensor[2].running_var, pixels.var(0), rtol=1e-4, atol=1e-6)
    variances = torch.stack([pixels[start : start + 32].var(0) for start in (0, 32, 64)] + [last.var(0)]).mean(0)
    torch.testing.assert_close(by_batches[2].running_var, variances, rtol=1e-4, atol=1e-6)


def test_one_image_for_the_norm_of_a_pixel_is_an_error_with_the_reason():
    model = pixel_net()
    before = snapshot(model)
    with pytest.raises(BitscapeError, match="a norm has no variance in it: give at least 2 images"):
        recalibrate_norms(model, images(1))
    assert not changed(before, model)


def test_memory_does_not_grow_with_the_batches(monkeypatch):
    monkeypatch.setattr("bitscape.quant.samples.SAMPLES", 64)
    model = quantized()
    x = images(40)
    x[7, 0, 0, 0] = 50.0  # the largest of all
    samples = record_inputs(model, quantized_layers(model), (x[i : i + 1] for i in range(40)))
    assert all(len(sample) == 64 + 2 for sample in samples.values())
    assert (float(samples["0"].min()), float(samples["0"].max())) == (float(x.min()), 50.0)
    again = record_inputs(model, quantized_layers(model), list(x.split(1)))
    assert all(torch.equal(again[name], sample) for name, sample in samples.items())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_that_is_not_float32_is_refused_with_the_next_step(kind):
    model = quantized()
    advice = rf"model: parameter 0\.weight is {kind}; the network must be float32: call model\.float\(\) first"
    with pytest.raises(BitscapeError, match=advice):
        calibrate(model.to(kind), images())
    with pytest.raises(BitscapeError, match=advice):
        with_quantizers(nn.Sequential(nn.Linear(3, 3)).to(kind), policy(nn.Sequential(nn.Linear(3, 3))))


@pytest.mark.parametrize(
    ("kind", "advice"),
    [(torch.float64, r"call images\.float\(\)"), (torch.float16, r"call images\.float\(\)"), (torch.uint8, r"Normalization\.apply")],
)
def test_images_that_are_not_float32_are_refused_with_the_next_step(kind, advice):
    with pytest.raises(BitscapeError, match=rf"images: {kind}; give a float32 tensor: .*{advice}"):
        calibrate(quantized(), images().to(kind))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_a_network_that_autocasts_within_its_forward_is_calibrated_as_in_float32(quantizer):
    class Autocasting(nn.Module):
        def __init__(self, enabled: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.enabled, self.first, self.second = enabled, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
                return self.second(self.first(x).relu()).float()

    bits = policy(Autocasting(False))
    plain, cast = (
        calibrate(with_quantizers(Autocasting(enabled), bits, quantizer), images()).eval() for enabled in (False, True)
    )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(cast.state_dict()[name], value, rtol=0.1, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(cast(images()), plain(images()), rtol=0.1, atol=0.2)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_default_type_of_torch_changes_nothing(quantizer):
    model, images = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(64, 4)
    expected = calibrate(with_quantizers(model, policy(model), quantizer), images).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        state = calibrate(with_quantizers(model, policy(model), quantizer), images).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert state.keys() == expected.keys() and all(value.dtype == expected[name].dtype for name, value in state.items())
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=0)


def test_statistics_that_are_not_finite_are_refused_and_the_former_ones_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(2.0)
    with pytest.raises(BitscapeError, match=r"the statistics of norm 1 on them are not finite"):
        recalibrate_norms(model, torch.full((4, 3), torch.nan))
    assert model[1].running_mean.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3), r"images: shape \(0, 3\); give at least one image"),
        ([torch.zeros(2, 3), torch.zeros(0, 3)], r"images: shape \(0, 3\); give at least one image"),
    ],
)
def test_what_holds_no_image_is_refused(images, message):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(BitscapeError, match=message):
        calibrate(with_quantizers(model, policy(model)), images)


@pytest.mark.parametrize("name", CALLED)
def test_calibration_sees_the_same_values_in_any_batches_of_any_inputs(name):
    network = CALLED[name].network()
    ready = with_quantizers(network, policy(network))
    inputs = CALLED[name].inputs(12)
    samples = Samples.of(inputs)
    values = [record_inputs(ready, quantized_layers(ready), data) for data in (samples, [inputs], iter([inputs]))]
    assert values[0].keys() == set(quantized_layers(ready))
    for layer, expected in values[0].items():
        assert all(torch.equal(found[layer], expected) for found in values[1:])
    layer = next(iter(values[0]))  # it takes the first images as they are
    images = torch.cat([tensor.flatten() for tensor in tensors_in(inputs) if tensor.ndim == 4])
    if name != "indices and mask":  # where some pixels are hidden
        assert set(values[0][layer].tolist()) <= set(images.tolist())


def test_labels_beside_the_images_are_named_whatever_holds_them():
    model = with_quantizers(nn.Sequential(nn.Linear(3, 3)), policy(nn.Sequential(nn.Linear(3, 3))))
    with pytest.raises(BitscapeError, match=r"inputs: the network fails on a batch of list \(0: shape \(2, 3\).*labels are neither"):
        calibrate(model, [[torch.randn(2, 3), torch.tensor([0, 1])]])


class Counted:
    """Batches of two images that are made when they are asked for, and the most that were alive at once."""

    def __init__(self, batches: int) -> None:
        self.batches, self.most = batches, 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __iter__(self):
        for number in range(self.batches):
            batch = drawn(4, 3, 8, 8, seed=number), drawn(4, 3, 8, 8, seed=number + 1)
            self._made.append(weakref.ref(batch[0]))
            self.most = max(self.most, sum(made() is not None for made in self._made))
            yield batch


@pytest.mark.parametrize(
    "look",
    [
        lambda network, folded, data: calibrate(network, data),
        lambda network, folded, data: recalibrate_norms(folded, data),
        lambda network, folded, data: input_moments(folded, data),
        lambda network, folded, data: correct_biases(calibrate(network, [next(iter(data))]), folded, data),
    ],
    ids=["calibrate", "recalibrate_norms", "input_moments", "correct_biases"],
)
@pytest.mark.parametrize("batches", [5, 40])
def test_memory_does_not_grow_with_the_number_of_batches(look, batches):
    float_network = CALLED["two images"].network()
    data = Counted(batches)
    look(with_quantizers(float_network, policy(float_network)), float_network, data)
    assert 0 < data.most <= 4  # the first one, those that `without_single_samples` looks ahead to, and the one at work


def test_samples_of_one_join_across_several_inputs_and_other_forms_stay_apart():
    batches = [(torch.full((n, 2), float(n)), {"mask": torch.ones(n, dtype=torch.bool)}) for n in (3, 1)]
    (joined,) = without_single_samples(batches)
    assert torch.equal(joined[0], torch.cat([batches[0][0], batches[1][0]])) and joined[1]["mask"].shape == (4,)
    apart = list(without_single_samples([torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(2, 3)]))
    assert [tuple(batch.shape) for batch in apart] == [(1, 2), (3, 3)]


def test_norms_of_a_network_of_several_inputs_average_over_samples():
    network = CALLED["two images"].network()
    inputs = CALLED["two images"].inputs(12)
    recalibrate_norms(network, Samples.of(inputs))
    maps = network.body[0](torch.cat(inputs, 1))
    torch.testing.assert_close(network.body[1].running_mean, maps.mean((0, 2, 3)))


def test_a_network_is_not_quantized_in_inference_mode():
    with torch.inference_mode(), pytest.raises(BitscapeError, match="inference_mode is on"):
        with_quantizers(nn.Sequential(nn.Linear(3, 2)), Policy({"0": LayerBits(4, 4)}))
