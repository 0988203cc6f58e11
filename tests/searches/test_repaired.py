import itertools

import torch
from torch import nn

from bitscape.data.samples import Samples
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import with_quantizers
from bitscape.quant.quantizers import Lsq
from bitscape.quant.repair import compensate_rounding, input_moments
from bitscape.searches.repaired import repaired_noise, rounded_weights
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
    rounded, noise = rounded_weights(model, moments, 3), repaired_noise(model, ["0", "4"], samples, PAIRS)
    for name in ("0", "4"):
        expected = deployed.get_submodule(name).get_parameter("weight")
        assert torch.equal(rounded[name], expected)
        assert torch.equal(noise[name].weights[3], (expected - model.get_submodule(name).weight).detach())


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
