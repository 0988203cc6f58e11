import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bitscape.dynamic.layers import (
    DynamicActivation,
    DynamicWeight,
    DynamicWeightLayer,
    make_static,
    make_weights_dynamic,
)
from bitscape.dynamic.widths import Widths
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.layers import QuantizedLayer, static_bits
from bitscape.quant.observers import MinMax
from bitscape.quant.quantizers import Lsq

LOW, HIGH = 2, 8
BELOW = torch.tensor([3.0, 8.0, 2.0, 3.0, 5.0])
OTHER = torch.tensor([4.0, 2.0, 2.0, 7.0, 4.0])


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME padding, in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        total = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
        x = nn.functional.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        return nn.functional.conv2d(x, self.weight, self.bias, stride=2)


CASES = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (5, 4, 8, 8)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (5, 4, 8, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (5, 4, 8, 8)),
    "grouped without bias": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 8, 8)),
    "linear on tokens": (lambda: nn.Linear(8, 3), (5, 7, 8)),
    "linear without bias": (lambda: nn.Linear(8, 3, bias=False), (5, 7, 8)),
    "same": (lambda: SameConv2d(4, 6, 3), (5, 4, 7, 8)),
}
every_case = pytest.mark.parametrize("case", CASES)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_case(case: str) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[case]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make(), values(*shape)


def static(layer: nn.Module, x: Tensor, bits: LayerBits) -> nn.Module:
    return calibrate(with_quantizers(layer, Policy({"": bits}), observer=MinMax()), x, MinMax())


def with_dynamic_inputs(layer: nn.Module, x: Tensor, weight_bits: int = 4) -> QuantizedLayer:
    made = with_quantizers(layer, Policy({"": LayerBits(weight_bits, 8)}), observer=MinMax())
    assert isinstance(made, QuantizedLayer)
    made.input_quantizer = DynamicActivation(Lsq().for_activation, LOW, HIGH)
    calibrate(made, x, MinMax())
    return made


def with_dynamic_weights(layer: nn.Module, x: Tensor) -> QuantizedLayer:
    made = with_dynamic_inputs(layer, x)
    make_weights_dynamic(made, partial(Lsq().for_weight, made.weight), LOW, HIGH, MinMax())
    return made


def set_widths(layer: QuantizedLayer, activation: Widths, weight: Widths | None = None) -> None:
    layer.input_quantizer.widths = activation
    if weight is not None:
        layer.weight_quantizer.widths = weight


# Activations


def plain(bits: int, x: Tensor) -> nn.Module:
    made = Lsq().for_activation(bits)
    made.initialize(x, MinMax())
    return made


def dynamic_activation(x: Tensor) -> DynamicActivation:
    made = DynamicActivation(Lsq().for_activation, LOW, HIGH)
    made.initialize(x, MinMax())
    return made


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_single_width_is_the_plain_quantizer_bit_for_bit(bits: int, signed: bool) -> None:
    x = values(5, 3, 4, 4) if signed else values(5, 3, 4, 4).relu()
    one, other = dynamic_activation(x), plain(bits, x)
    one.widths = Widths(torch.full((5,), float(bits)))
    assert torch.equal(one.at(bits).scale, other.scale) and one.at(bits).signed is signed
    mine, theirs = one(x), other(x)
    assert torch.equal(mine, theirs)
    g = values(5, 3, 4, 4, seed=1)
    mine.backward(g)
    theirs.backward(g)
    torch.testing.assert_close(one.at(bits).scale.grad, other.scale.grad)
    assert all(each.scale.grad is None for each in one.of_width if each is not one.at(bits))


def test_every_image_is_quantized_at_its_width() -> None:
    x = values(5, 3, 4, 4)
    made = dynamic_activation(x)
    made.widths = Widths(BELOW)
    rows = [plain(int(bits), x)(x[at : at + 1]) for at, bits in enumerate(BELOW)]
    assert torch.equal(made(x), torch.cat(rows))


def test_groups_do_not_change_the_gradient_of_a_scale() -> None:
    # Its factor counts the elements of one image, so that images add up however they are grouped.
    x, g = values(5, 3, 4, 4), values(5, 3, 4, 4, seed=1)
    made = dynamic_activation(x)
    made.widths = Widths(torch.tensor([4.0, 6, 4, 6, 4]))
    made(x).backward(g)
    other = plain(4, x)
    for at in (0, 2, 4):
        other(x[at : at + 1]).backward(g[at : at + 1])
    torch.testing.assert_close(made.at(4).scale.grad, other.scale.grad)


def test_there_is_one_quantizer_for_each_width() -> None:
    made = DynamicActivation(Lsq().for_activation, 3, 6)
    assert [made.at(bits).bits for bits in range(3, 7)] == [3, 4, 5, 6] and len(made.of_width) == 4
    assert "3..6" in repr(made)


def test_widths_that_are_not_set_are_explained() -> None:
    x = values(5, 3, 4, 4)
    made = dynamic_activation(x)
    with pytest.raises(BitscapeError, match=r"widths: none for a batch of 5.*DynamicNetwork"):
        made(x)
    made.widths = Widths(BELOW)
    with pytest.raises(BitscapeError, match=r"widths: 5 for a batch of 3"):
        made(x[:3])


# Weights


@every_case
def test_every_image_meets_the_weight_of_its_width(case: str) -> None:
    layer, x = of_case(case)
    made = with_dynamic_weights(layer, x)
    set_widths(made, Widths(OTHER), Widths(BELOW))
    rows = [static(layer, x, LayerBits(int(w), int(a)))(x[at : at + 1]) for at, (w, a) in enumerate(zip(BELOW, OTHER, strict=True))]
    torch.testing.assert_close(made(x), torch.cat(rows))


@every_case
def test_a_width_between_two_is_their_mixture(case: str) -> None:
    layer, x = of_case(case)
    made = with_dynamic_weights(layer, x)
    below, f = torch.tensor([2.0, 3, 2, 7, 5]), torch.tensor([0.25, 0.5, 0.0, 1.0, 0.875]).requires_grad_()
    set_widths(made, Widths(OTHER), Widths(below, f))
    found = made(x)

    def at_weight(above: int) -> Tensor:
        pairs = zip(below + above, OTHER, strict=True)
        return torch.cat([static(layer, x, LayerBits(int(w), int(a)))(x[at : at + 1]) for at, (w, a) in enumerate(pairs)])

    here, above = at_weight(0).detach(), at_weight(1).detach()
    share = f.detach().view(-1, *(1,) * (found.ndim - 1))
    torch.testing.assert_close(found.detach(), (1 - share) * here + share * above)
    g = values(*found.shape, seed=2)
    found.backward(g)
    torch.testing.assert_close(f.grad, (g * (above - here)).flatten(1).sum(1), rtol=1e-4, atol=1e-4)


def test_the_class_tells_and_keeps_what_it_is() -> None:
    layer, x = of_case("conv2d")
    made = with_dynamic_weights(layer, x)
    again = with_dynamic_weights(layer, x)
    assert isinstance(made, DynamicWeightLayer) and isinstance(made, nn.Conv2d) and isinstance(made.weight_quantizer, DynamicWeight)
    assert type(made) is type(again) and type(made).__name__ == "DynamicQuantConv2d"
    assert isinstance(copy.deepcopy(made), type(made))


def test_a_weight_layer_without_widths_is_explained() -> None:
    layer, x = of_case("conv2d")
    made = with_dynamic_weights(layer, x)
    set_widths(made, Widths(OTHER))
    with pytest.raises(BitscapeError, match="widths: none for a batch of 5"):
        made(x)


# Back to static


@every_case
@pytest.mark.parametrize("weights", [False, True], ids=["inputs", "weights too"])
def test_made_static_it_is_an_ordinary_layer_bit_for_bit(case: str, weights: bool) -> None:
    layer, x = of_case(case)
    made = with_dynamic_weights(layer, x) if weights else with_dynamic_inputs(layer, x, weight_bits=3)
    other = static(layer, x, LayerBits(3, 5))
    make_static(made, LayerBits(3, 5))
    assert type(made) is type(other) and static_bits(made) == LayerBits(3, 5)
    assert torch.equal(made(x), other(x))
    one, two = made.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@every_case
def test_one_width_for_all_is_the_static_layer(case: str) -> None:
    layer, x = of_case(case)
    made = with_dynamic_weights(layer, x)
    set_widths(made, Widths(torch.full((5,), 5.0)), Widths(torch.full((5,), 3.0)))
    found, expected = made(x), static(layer, x, LayerBits(3, 5))(x)
    if made.bias is None:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)  # a bias is added after the convolution, where a static layer fuses both
