import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.cost.layers import LayerCost, NetworkProfile, Uncounted, measure
from bitscape.errors import BitscapeError
from bitscape.models.layers import layer_shapes
from tests.networks import resnet18, resnet20


def test_counts_of_every_kind_of_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 8, 5),
    )
    cost = measure(model, (3, 10, 10))
    assert [layer.kind for layer in cost.layers] == ["Conv2d", "Conv2d", "Conv1d", "Linear"]
    assert [layer.macs for layer in cost.layers] == [8 * 25 * 27, 8 * 9 * 9, 4 * 8 * 16, 160]
    assert [layer.weights for layer in cost.layers] == [216, 72, 64, 160]
    assert [layer.scales for layer in cost.layers] == [8, 8, 4, 5]
    assert [layer.input_elements for layer in cost.layers] == [300, 200, 72, 32]
    assert [layer.output_elements for layer in cost.layers] == [200, 72, 32, 5]
    assert cost.shapes == layer_shapes(model)
    assert cost.ends == ("0", "5")
    assert cost.by_name["3"].weight_shape == (4, 8, 2)


def test_layers_alone_make_up_the_macs_of_a_convolutional_network():
    cost = measure(resnet20(), (3, 32, 32))
    assert cost.total_macs == cost.covered_macs == 40_818_944
    assert cost.uncalled == ()
    assert sum(layer.weights for layer in cost.layers) + sum(entry.params for entry in cost.uncounted) == sum(
        parameter.numel() for parameter in resnet20().parameters()
    )


def test_parameters_outside_layers_are_listed_by_module():
    cost = measure(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.PReLU()), (3, 4, 4))
    assert cost.uncounted == (
        Uncounted(name="0", what="Conv2d bias", params=8, macs=0),
        Uncounted(name="1", what="BatchNorm2d", params=16, macs=0),
        Uncounted(name="2", what="PReLU", params=1, macs=0),
    )


def test_linear_layer_counts_tokens():
    layer = measure(nn.Linear(6, 4, bias=False), (10, 6)).layers[0]
    assert (layer.macs, layer.input_elements, layer.output_elements, layer.weights) == (240, 60, 40, 24)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.alias = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.conv(x)[..., ::2, ::2])


def test_layer_run_twice_counts_macs_twice_and_weights_once():
    cost = measure(Twice(), (3, 8, 8))
    assert cost.layers == (
        LayerCost(
            name="conv",
            kind="Conv2d",
            macs=81 * (64 + 16),
            weights=81,
            weight_shape=(3, 3, 3, 3),
            scales=3,
            input_elements=192,
            output_elements=192,
            calls=2,
        ),
    )
    assert cost.total_macs == cost.covered_macs


def test_shared_parameter_is_counted_by_the_first_layer_called():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    first, second = measure(model, (4,)).layers
    assert (first.weights, first.scales, first.tied_to) == (16, 4, None)
    assert (second.weights, second.scales, second.tied_to, second.macs) == (0, 0, "0", 16)
    assert measure(model, (4,)).tied == (("0", "2"),)


class Reader(nn.Module):
    """Reads one layer's weight without calling the layer, as some attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(6, 6, bias=False)
        self.read = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


def test_never_called_layer_is_listed_with_its_parameters_and_macs(caplog):
    model = Reader()
    with caplog.at_level(logging.WARNING, logger="bitscape.cost"):
        cost = measure(model, (6,))
    assert cost.uncalled == ("read",)
    assert cost.uncounted == (
        Uncounted(name="(network)", what="Reader", params=0, macs=36),
        Uncounted(name="read", what="Linear, never called", params=42, macs=0),
    )
    assert (cost.covered_macs, cost.total_macs) == (36, 72)
    assert cost.shapes == layer_shapes(model)
    assert "never calls these layers, their bits have no effect: read" in caplog.text
    assert "cover 50.0 % of the MACs" in caplog.text and "(network) (Reader, 3.6e-05 M)" in caplog.text


def test_attention_counts_as_the_four_layers_that_take_bits():
    width, tokens = 8, 5
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
    cost = measure(layer, (tokens, width))
    projections = [f"self_attn.{letter}_proj" for letter in "qkv"] + ["self_attn.out_proj"]
    assert [entry.name for entry in cost.layers] == [*projections, "linear1", "linear2"]
    assert [cost.by_name[name].macs for name in projections] == [tokens * width * width] * 4
    products = next(entry for entry in cost.uncounted if entry.name == "self_attn")
    assert products.macs == 2 * tokens * tokens * width
    assert isinstance(layer.self_attn, nn.MultiheadAttention)  # the network stays as it is


def test_attention_products_of_a_split_module_are_uncounted_macs():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(*self.qkv(x).unsqueeze(1).chunk(3, -1))

    cost = measure(Attention(), (5, 8))
    assert cost.total_macs - cost.covered_macs == 2 * 5 * 5 * 8


class RecordedConv(nn.Conv2d):
    """Stands for a quantized layer: a subclass with quantizers as children."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.weight_quantizer = nn.Sequential(nn.PReLU(self.weight.shape[0]))
        self.input_quantizer = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight.transpose(0, 1)).transpose(0, 1)
        return self._conv_forward(self.input_quantizer(x), weight, self.bias)


def test_quantized_network_costs_what_the_float_one_costs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2))
    quantized = nn.Sequential(RecordedConv(3, 4, 3), nn.BatchNorm2d(4), RecordedConv(4, 4, 3, groups=2))
    assert measure(quantized, (3, 8, 8)) == measure(model, (3, 8, 8))


def test_quantizer_that_gives_a_view_of_a_trainable_weight_can_be_measured():
    class ReadsValues(RecordedConv):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.sum().item() > 0 else 1)

    model = ReadsValues(3, 4, 3)
    assert measure(model, (3, 8, 8)).total_macs == 4 * 36 * 27
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrong_shape_is_an_error_with_the_shape_and_the_reason():
    with pytest.raises(BitscapeError, match=r"input_shape=\(4, 32, 32\).*\(1, 4, 32, 32\).*RuntimeError: .*channels"):
        measure(resnet20(), (4, 32, 32))


@pytest.mark.parametrize("shape", [(), (3, 0, 8), (3, -1, 8), (3, 2.5, 8), (None, 3)])
def test_impossible_shape_is_an_error(shape):
    with pytest.raises(BitscapeError, match="positive integers without the batch dimension"):
        measure(resnet20(), shape)


def test_network_without_layers_is_an_error():
    with pytest.raises(BitscapeError, match=r"Sequential runs no convolution \(Conv1d to Conv3d, .*\), Linear"):
        measure(nn.Sequential(nn.BatchNorm2d(3)), (3, 8, 8))


def test_network_on_the_meta_device_can_be_measured():
    with torch.device("meta"):
        model = resnet18()
    assert measure(model, (3, 224, 224)).total_macs == 1_814_073_344


def test_ends_are_in_order_of_call_not_of_registration():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.stem = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    cost = measure(Backwards(), (4,))
    assert isinstance(cost, NetworkProfile)
    assert cost.ends == ("stem", "head")


class Resized(nn.Conv2d):
    """Its output is not what it convolved: `after` changes it, `before` changes what it convolves."""

    def __init__(self, *sizes: int, before: Any = None, after: Any = None, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x)))


class SumOfTwo(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, padding=1) + functional.conv2d(x, self.weight * 2, padding=1)


class Part(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight[:2], padding=1)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), padding=1)


class Transposed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv_transpose2d(x, self.weight, stride=2)


class Added(nn.Linear):
    """A low-rank product beside the weight's own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.ones(2, inputs)), nn.Parameter(torch.ones(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.linear(functional.linear(x, self.down), self.up)


class ByElement(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x[..., None, :] * self.weight).sum(-1)


PLAIN = 4 * 4 * 9 * 64
"""MACs of a 3x3 convolution of 4 to 4 channels on 8x8 positions."""


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (Resized(4, 4, 3, padding=1, after=nn.Upsample(scale_factor=2)), PLAIN),
        (Resized(4, 4, 3, padding=1, after=nn.MaxPool2d(2)), PLAIN),
        (Resized(4, 4, 3, padding=1, after=nn.AdaptiveAvgPool2d(1)), PLAIN),
        (Resized(4, 4, 3, before=nn.ZeroPad2d(1)), PLAIN),
        (Resized(4, 4, 3, before=nn.ZeroPad2d(1), after=nn.ZeroPad2d(3)), PLAIN),
        (Resized(4, 4, 3, padding=1, groups=4, after=nn.Upsample(scale_factor=2)), PLAIN // 4),
        (Resized(4, 4, 3, padding=2, dilation=2, after=nn.MaxPool2d(2)), PLAIN),
        (Resized(4, 4, 3, padding=1, stride=2, after=nn.Upsample(scale_factor=2)), PLAIN // 4),
        (SumOfTwo(4, 4, 3), 2 * PLAIN),
        (Part(4, 4, 3), PLAIN // 2),
        (Standardized(4, 4, 3), PLAIN),
        (Transposed(4, 4, 3), PLAIN),
        (nn.Sequential(nn.Flatten(2), Added(64, 5)), 4 * 64 * 5),
        (nn.Sequential(nn.Flatten(2), ByElement(64, 5)), 4 * 64 * 5),
    ],
)
def test_macs_are_of_what_a_layer_ran_with_its_weight(layer: nn.Module, macs: int) -> None:
    (counted,) = measure(layer, (4, 8, 8)).layers
    assert counted.macs == macs


def test_products_without_the_weight_are_uncounted_and_nothing_is_counted_twice() -> None:
    cost = measure(nn.Sequential(nn.Flatten(2), Added(64, 5)), (4, 8, 8))
    assert [(entry.name, entry.macs) for entry in cost.uncounted] == [("1", 4 * (64 * 2 + 2 * 5))]
    outer = nn.Sequential(Resized(4, 4, 3, padding=1, before=nn.Conv2d(4, 4, 3, padding=1)))
    cost = measure(outer, (4, 8, 8))
    assert {layer.name: layer.macs for layer in cost.layers} == {"0": PLAIN, "0.before": PLAIN}
    assert cost.total_macs == 2 * PLAIN


def test_a_layer_called_with_several_sizes_counts_each_call() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Resized(4, 4, 3, padding=1, after=nn.Upsample(scale_factor=2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    cost = measure(Several(), (4, 8, 8))
    assert (cost.by_name["layer"].macs, cost.by_name["layer"].calls) == (PLAIN + 4 * PLAIN, 2)


def test_a_network_that_takes_indices_is_measured_on_them() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Flatten(), nn.Linear(18, 2))
    cost = measure(model, (3,))
    assert {layer.name: layer.macs for layer in cost.layers} == {"1": 3 * 4 * 6, "3": 18 * 2}
    assert [(entry.name, entry.params) for entry in cost.uncounted if entry.name == "0"] == [("0", 20)]


class Heads(nn.Module):
    """A residual block, and heads that `join` puts together."""

    def __init__(self, join):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
        self.join = join

    def forward(self, x):
        x = self.stem(x).relu_()
        x = x + self.block(x)
        return self.join(self, x)


def _written(net, x):
    out = x.new_zeros(len(x), 6, 8, 8)
    out[:, :4], out[:, 4:] = net.boxes(x), net.classes(x).sigmoid_()
    return out


def _in_place(net, x):
    y = net.boxes(x)
    y += net.boxes(x.relu())
    return y


@pytest.mark.parametrize(
    ("join", "ends"),
    [
        (lambda net, x: (net.boxes(x), {"classes": net.classes(x).argmax(1)}), ("stem", "boxes", "classes")),
        (lambda net, x: torch.cat([net.boxes(x).flatten(2), net.classes(x).flatten(2).softmax(1)], 1).mT, ("stem", "boxes", "classes")),
        (_written, ("stem", "boxes", "classes")),
        (lambda net, x: torch.einsum("nchw,nkhw->nck", net.boxes(x), net.classes(x)), ("stem", "boxes", "classes")),
        (lambda net, x: [net.boxes(x), x], ("stem", "block", "boxes")),
        (_in_place, ("stem", "boxes")),
        (lambda net, x: x, ("stem", "block")),  # of a sum of branches the later one counts
        (lambda net, x: nn.functional.layer_norm(x + net.block(x), (8, 8)), ("stem", "block")),
        (lambda net, x: torch.zeros(2), ("stem", "block")),  # the last layer called, where none reaches an output
    ],
)
def test_every_layer_whose_output_reaches_an_output_is_an_end(join, ends, caplog):
    assert measure(Heads(join), (3, 8, 8)).ends == ends


def test_a_forward_that_reads_values_has_its_heads_too():
    def read(net, x):
        return net.boxes(x) if float(x.sum()) == float(x.sum()) else x

    assert measure(Heads(read), (3, 8, 8)).ends == ("stem", "boxes")
