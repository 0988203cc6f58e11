import itertools
import math

import pytest
import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import with_quantizers
from bitscape.quant.quantizers import Lsq
from bitscape.quant.repair import compensate_rounding, input_moments
from bitscape.searches.repaired import repaired_noise, rounded_weights, unseen_growth
from bitscape.searches.sensitivity import layer_noise

PAIRS = (LayerBits(2, 8), LayerBits(3, 2))
IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0)).relu()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def test_weights_are_rounded_as_in_the_network_that_will_run() -> None:
    model, samples = network(), Samples.of(IMAGES)
    moments = input_moments(model, samples)
    deployed = with_quantizers(model, uniform_policy(["0", "2", "4"], LayerBits(3, 2)), Lsq())
    compensate_rounding(deployed, moments)
    rounded, errors = rounded_weights(model, moments, 3)
    noise = repaired_noise(model, ["0", "4"], samples, PAIRS)
    for name in ("0", "4"):
        expected = deployed.get_submodule(name).get_parameter("weight")
        assert torch.equal(rounded[name], expected)
        change = (expected - model.get_submodule(name).weight).detach()
        growth = math.sqrt(errors[name].unseen / errors[name].repaired)
        assert growth >= 1.0
        torch.testing.assert_close(noise[name].weights[3], growth * change)


def test_codes_that_fit_few_images_are_scored_by_what_they_do_to_others() -> None:
    """Sixteen images of 192 values can be fitted; what that does to others says nothing about them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8)).eval().requires_grad_(False)
    images, others = torch.randn(2, 16, 3, 8, 8).flatten(2).unbind()
    noise = repaired_noise(model, ["1"], Samples.of(images), (LayerBits(2, 8),))["1"]
    (scored,), _ = noise.output_changes(images)
    weights, _ = rounded_weights(model, input_moments(model, Samples.of(images)), 2)
    seen, unseen = ((x @ (weights["1"] - model[1].weight).T).square().mean() for x in (images, others))
    assert seen < 0.6 * unseen
    assert float(scored.square().mean()) == pytest.approx(float(unseen), rel=0.3)


def test_a_bias_takes_back_the_means_and_no_more() -> None:
    model, samples = network(), Samples.of(IMAGES)
    noise = repaired_noise(model, ["0", "2"], samples, PAIRS)
    before = {"0": IMAGES, "2": model[:2](IMAGES).detach()}
    for name, x in before.items():
        changes = torch.stack([*itertools.chain(*noise[name].output_changes(x))])
        means = changes.mean((1, 3, 4))
        if name == "0":
            assert means.abs().max() < 1e-6 < changes.abs().max()
        else:
            assert noise[name].shifts is None and means.abs().max() > 1e-3


def test_what_repair_leaves_is_less_than_what_nearest_rounding_does() -> None:
    model, samples = network(), Samples.of(IMAGES)
    nearest, repaired = (
        make(model, ["0"], samples, PAIRS)["0"].output_changes(IMAGES) for make in (layer_noise, repaired_noise)
    )
    sizes = [[float(change.square().sum()) for change in itertools.chain(*of)] for of in (nearest, repaired)]
    assert all(after < before for before, after in zip(*sizes, strict=True))


def test_coarse_weights_have_the_noise_of_coarse_scales() -> None:
    model, samples = network(), Samples.of(IMAGES)
    coarse = Lsq(coarseness=2.0)
    noise = repaired_noise(model, ["0"], samples, PAIRS, quantizer=coarse)
    weights, errors = rounded_weights(model, input_moments(model, samples), 3, coarse)
    expected = (weights["0"] - model[0].weight).detach() * unseen_growth(errors["0"])
    assert torch.equal(noise["0"].weights[3], expected)
