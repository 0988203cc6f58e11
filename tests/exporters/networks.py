"""Small networks of every structure that the exporters must follow, in quantized, integer and file form."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscape.exporters.integer.form import IntegerNetwork, integer_network
from bitscape.models.attention import split_attention
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.quantizers import Lsq, Quantizer
from tests.networks import Residual, conv_norm, inverted_residual

if TYPE_CHECKING:
    from bitscape.exporters.onnx.qdq import OnnxInfo

MIXED = ((8, 8), (3, 4), (1, 2), (5, 7), (2, 3), (7, 5), (4, 6), (6, 2))
"""Weight and activation bits that layers get in turn."""
EIGHT = ((8, 8),)


def images(n: int = 16, size: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def policy_for(model: nn.Module, bits: Iterable[tuple[int, int]] = MIXED) -> Policy:
    widths, names = list(bits), layer_shapes(split_attention(copy.deepcopy(model)))
    return Policy({name: LayerBits(*widths[i % len(widths)]) for i, name in enumerate(names)})


def lively(model: nn.Module) -> nn.Module:
    """The network with norms whose statistics and parameters are neither zero nor one, a third of the gammas negative."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.4, 1.6, generator=generator)[::3] *= -1
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model


def quantized(
    model: nn.Module, x: Tensor | None = None, bits: Iterable[tuple[int, int]] = MIXED, quantizer: Quantizer | None = None
) -> nn.Module:
    """`model` quantized by a policy of `bits` in turn and calibrated on `x`."""
    model = lively(model).eval()
    return calibrate(with_quantizers(model, policy_for(model, bits), quantizer or Lsq()), images() if x is None else x)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


class Applied(nn.Module):
    """A network given as a function of its named layers and the input."""

    def __init__(self, function: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME padding: what is odd goes behind."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [self._pad(n, k, s, d) for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)]
        return F.conv2d(F.pad(x, [*pads[1], *pads[0]]), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    @staticmethod
    def _pad(n: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
        total = max((-(-n // stride) - 1) * stride + (kernel - 1) * dilation + 1 - n, 0)
        return total // 2, total - total // 2


class StandardConv2d(nn.Conv2d):
    """Its weight is standardized on the way: what reaches the convolution lies on no grid."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias, self.stride, self.padding)


class OptionA(nn.Module):
    """The CIFAR shortcut without weights: every other pixel, zeros for the new channels."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


def head(features: int, classes: int = 5) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def plain() -> nn.Module:
    stem = [*conv_norm(3, 8, 3), nn.ReLU(), *conv_norm(8, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*stem, nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(4, 5))


def mobile() -> nn.Module:
    return nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU6(), inverted_residual(8, 8, 2, 1), inverted_residual(8, 12, 3, 2), *head(12))


def residual() -> nn.Module:
    def block(inputs: int, width: int, stride: int, shortcut: nn.Module, relu: bool = True) -> Residual:
        body = [*conv_norm(inputs, width, 3, stride), nn.ReLU(), *conv_norm(width, width, 3)]
        return Residual(nn.Sequential(*body), shortcut, relu)

    first = block(8, 8, 1, nn.Identity())
    second = block(8, 12, 2, nn.Sequential(*conv_norm(8, 12, 1, 2)), relu=False)  # zeros are padded to signed codes
    return nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU(), first, second, block(12, 16, 2, OptionA(4)), *head(16))


def geometries() -> nn.Module:
    return nn.Sequential(
        SameConv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        SameConv2d(8, 8, 2, dilation=2, groups=8), nn.ReLU(),
        nn.Conv2d(8, 12, (3, 1), (1, 2), (1, 0), groups=4), nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding="same"), nn.Conv2d(8, 8, (1, 3), padding=1, padding_mode="reflect"), nn.Hardtanh(),
        nn.Conv2d(8, 8, 3, padding=2, padding_mode="replicate"), nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip


def signals() -> nn.Module:
    body = [nn.Conv1d(3, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 3, 2), nn.ReLU()]
    return Applied(lambda net, x: net.body(x.flatten(2)), body=nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)))


def products() -> nn.Module:
    """Linear layers on tokens and on vectors, with and without bias, with a bias of zeros; a norm over as many tokens as features."""

    def forward(net, x):
        tokens = net.norm(net.b(F.relu(net.a(x.flatten(2).transpose(1, 2)))))
        return net.e(F.relu(net.vector_norm(net.d(F.relu(net.c(tokens)).mean(1)))))

    layers = {"a": nn.Linear(3, 16), "b": nn.Linear(16, 64, bias=False), "norm": nn.BatchNorm1d(64), "c": nn.Linear(64, 8)}
    nn.init.zeros_(layers["c"].bias)
    return Applied(forward, **layers, d=nn.Linear(8, 6, bias=False), vector_norm=nn.BatchNorm1d(6), e=nn.Linear(6, 4))


def excited() -> nn.Module:
    """Squeeze-excitation and float activations between integer layers."""

    def forward(net, x):
        x = net.a(x)
        gate = torch.sigmoid(net.expand(F.silu(net.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return net.head(x * gate)

    def nonlinear(kind: nn.Module) -> nn.Sequential:
        return nn.Sequential(*conv_norm(8, 8, 3), kind)

    kinds = nn.Sequential(nonlinear(nn.GELU()), nonlinear(nn.Hardswish()), nonlinear(nn.LeakyReLU(0.1)))
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.SiLU())
    return Applied(forward, a=first, squeeze=nn.Conv2d(8, 4, 1), expand=nn.Conv2d(4, 8, 1), head=nn.Sequential(kinds, *head(8)))


def fire() -> nn.Module:
    """SqueezeNet: two branches, concatenated and pooled."""

    def forward(net, x):
        x = F.relu(net.squeeze(F.relu(net.stem(x))))
        return net.head(F.max_pool2d(torch.cat([F.relu(net.left(x)), F.relu(net.right(x))], 1), 2))

    last = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
    convs = {"stem": nn.Conv2d(3, 8, 3), "squeeze": nn.Conv2d(8, 4, 1), "left": nn.Conv2d(4, 6, 1), "right": nn.Conv2d(4, 6, 3, padding=1)}
    return Applied(forward, **convs, head=last)


def shuffled() -> nn.Module:
    """ShuffleNetV2: half the channels pass by, then all are shuffled; and torch's own shuffles."""

    def forward(net, x):
        left, right = net.stem(x).chunk(2, 1)
        x = torch.cat([left, net.branch(right)], 1)
        n, c, h, w = x.shape
        return net.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    branch = [*conv_norm(4, 4, 1), nn.ReLU(), *conv_norm(4, 4, 3, groups=4), *conv_norm(4, 4, 1), nn.ReLU()]
    after = [nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.ChannelShuffle(4), nn.Conv2d(8, 4, 1), nn.PixelUnshuffle(2), nn.ReLU()]
    stem = nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU())
    return Applied(forward, stem=stem, branch=nn.Sequential(*branch), head=nn.Sequential(*after, *head(16)))


def preactivated() -> nn.Module:
    """DenseNet and a pre-activation residual: norms in front of convolutions, average pooling between."""

    def forward(net, x):
        x = net.stem(x)
        x = torch.cat([x, net.dense(x)], 1)
        x = net.transition(x)
        return net.head(x + net.body(x))

    def before(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))

    transition = nn.Sequential(before(12, 8), nn.AvgPool2d(2))
    last = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), *head(8))
    return Applied(forward, stem=nn.Conv2d(3, 8, 3, padding=1), dense=before(8, 4), transition=transition, body=before(8, 8), head=last)


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, 16) * 0.1) for n in (1, 17))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


def convnext() -> nn.Module:
    def forward(net, x):
        x = net.patches(x)
        y = net.depthwise(x).permute(0, 2, 3, 1)
        y = net.narrow(F.gelu(net.wide(net.norm(y)))).permute(0, 3, 1, 2)
        return net.head((x + y).mean((2, 3)))

    layers = {"patches": nn.Conv2d(3, 8, 2, 2), "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8), "norm": nn.LayerNorm(8)}
    return Applied(forward, **layers, wide=nn.Linear(8, 16), narrow=nn.Linear(16, 8), head=nn.Linear(8, 3))


def repeated() -> nn.Module:
    """A convolution used twice under two names, once with a norm behind it; several outputs."""

    def forward(net, x):
        x = F.relu(net.twice(F.relu(net.stem(x))))
        x = F.relu(net.norm(net.again(x)))
        return net.head(x), x

    shared = nn.Conv2d(8, 8, 3, padding=1)
    last = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5))
    return Applied(forward, stem=nn.Conv2d(3, 8, 3), twice=shared, again=shared, norm=nn.BatchNorm2d(8), head=last)


class Heads(nn.Module):
    """Outputs of many shapes in a structure: convolutions that end the network, features that layers take as well, the images, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.boxes, self.scores, self.masks = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.classes, self.tap = nn.Linear(8, 5), nn.Conv2d(8, 8, 1)
        self.register_buffer("anchors", torch.arange(8.0).reshape(2, 4))

    def forward(self, pixels: Tensor) -> dict[str, object]:
        features = F.relu(self.body(F.relu(self.stem(pixels))))
        scores = self.scores(features)
        tapped = self.tap(features)  # a convolution takes what is an output, too
        masks = F.interpolate(torch.sigmoid(self.masks(tapped)), scale_factor=2, mode="bilinear")
        heads = [self.boxes(features) * 8, scores.flatten(2).transpose(1, 2)]
        logits = self.classes(features.mean((2, 3)))
        maps = {"masks": masks, "relu": features, "tap": tapped}
        return {"logits": logits, "heads": heads, **maps, "pixels": pixels, "anchors": self.anchors, "none": None}


OUTPUTS_OF_HEADS = ("logits", "heads.0", "heads.1", "masks", "relu", "tap", "pixels", "anchors")


def pyramid() -> nn.Module:
    """A head that the levels of a pyramid share, a norm of its own behind each call; then two layers that are tied by one weight."""

    def forward(net, x):
        fine = F.relu(net.stem(x))
        ends = []
        for level, norms in zip((fine, F.max_pool2d(fine, 2)), net.norms, strict=True):
            y = F.relu(norms[1](net.tower(F.relu(norms[0](net.tower(level))))))
            ends.append(F.relu(net.boxes(F.max_pool2d(y, y.shape[-1] // 2))).flatten(1))
        return net.tied(ends[0]) + net.other(ends[1])

    norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2)) for _ in range(2))
    convs = {"stem": nn.Conv2d(3, 8, 3, padding=1), "tower": nn.Conv2d(8, 8, 3, padding=1, bias=False), "boxes": nn.Conv2d(8, 4, 1)}
    network = Applied(forward, **convs, norms=norms, tied=nn.Linear(16, 5), other=nn.Linear(16, 5))
    network.other.weight = network.tied.weight
    return network


class Floats(nn.Module):
    """Convolutions that stay float: a functional one, a transposed one, and one whose forward changes the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kernel = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 8, 1, 1))
        self.up, self.standard, self.last = nn.ConvTranspose2d(8, 8, 2, 2), StandardConv2d(8, 8, 3), nn.Conv2d(8, 4, 3)
        self.aside = nn.Conv2d(3, 3, 1)
        """Never runs."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(F.relu(self.stem(x)), self.kernel))
        return self.last(F.relu(self.standard(F.relu(self.up(x))))).flatten(1)


_EXACT = (plain, mobile, geometries, signals, products, fire, convnext, repeated, pyramid)
EXACT = {f.__name__: f for f in _EXACT} | {"vit": Vit, "heads": Heads}
"""What ONNX Runtime computes of these is exactly defined."""
ROUNDED = {f.__name__: f for f in (residual, excited, shuffled, preactivated)} | {"floats": Floats}
"""Here kernels add, pool or concatenate codes, or compute in float, each in its own way of rounding."""
ZOO = EXACT | ROUNDED
CASES = [(name, EIGHT) for name in ZOO] + [(name, MIXED) for name in ("mobile", "products", "pyramid")]


@dataclass(frozen=True)
class Exported:
    network: nn.Module
    """Quantized."""
    integer: IntegerNetwork
    content: bytes
    """The ONNX file, of containers that every runtime reads."""
    info: "OnnxInfo"


def integers(name: str, bits: tuple[tuple[int, int], ...] = EIGHT) -> tuple[nn.Module, IntegerNetwork]:
    """A network of the zoo, quantized and in integer form: made once."""
    return _integers(name, bits)


@cache
def _integers(name: str, bits: tuple[tuple[int, int], ...]) -> tuple[nn.Module, IntegerNetwork]:
    network = quantized(made(ZOO[name]), bits=bits)
    return network, integer_network(network, images())


def exported(name: str, bits: tuple[tuple[int, int], ...] = EIGHT) -> Exported:
    """A network of the zoo as an ONNX file: made once."""
    return _exported(name, bits)


@cache
def _exported(name: str, bits: tuple[tuple[int, int], ...]) -> Exported:
    from bitscape.exporters.onnx.qdq import PORTABLE, write_onnx

    network, integer = integers(name, bits)
    with tempfile.TemporaryDirectory() as folder, one_graph(integer):
        info = write_onnx(integer, Path(folder) / "network.onnx", images(), containers=PORTABLE)
        return Exported(network, integer, info.path.read_bytes(), info)


GRAPHS: dict[IntegerNetwork, Any] = {}
"""What torch.onnx made of a network."""


@contextmanager
def one_graph(network: IntegerNetwork) -> Iterator[None]:
    """Within, files of `network`, whatever their form, start from one graph: torch.onnx takes a second to make it."""
    import onnx_ir as ir

    from bitscape.exporters.onnx import qdq

    make = qdq.onnx_graph

    def graph(*arguments: Any, **settings: Any) -> ir.Model:
        if network not in GRAPHS:
            GRAPHS[network] = ir.to_proto(make(*arguments, **settings))
        return ir.from_proto(GRAPHS[network])

    with mock.patch.object(qdq, "onnx_graph", graph):
        yield


def other_images() -> Tensor:
    """Images within and far beyond the ranges of calibration."""
    return torch.cat([images(6, seed=2), 4 * images(5, seed=3)])
