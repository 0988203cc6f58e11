"""Small networks of every structure that the exporters must follow, and a quantized form of them."""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscape.models.attention import split_attention
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, quantize
from bitscape.quant.quantizers import Lsq, Quantizer
from tests.networks import Residual, conv_norm, inverted_residual

MIXED = ((8, 8), (3, 4), (1, 2), (5, 7), (2, 3), (7, 5), (4, 6), (6, 2))
"""Weight and activation bits that layers get in turn."""


def images(n: int = 16, size: int = 8, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def policy_for(model: nn.Module, bits: Iterable[tuple[int, int]] = MIXED) -> Policy:
    widths, names = list(bits), layer_shapes(split_attention(copy.deepcopy(model)))
    return Policy({name: LayerBits(*widths[i % len(widths)]) for i, name in enumerate(names)})


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network with norm statistics and parameters that are neither zero nor one, gammas of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.4, 1.6, generator=generator)
                    module.weight[::3] *= -1
                    module.bias.normal_(0, 0.3, generator=generator)
    return model


def quantized(
    model: nn.Module, x: Tensor, bits: Iterable[tuple[int, int]] = MIXED, quantizer: Quantizer | None = None
) -> nn.Module:
    model = lively(model).eval()
    return calibrate(quantize(model, policy_for(model, bits), quantizer or Lsq()), x)


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
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
        x = F.pad(x, [*pads[1], *pads[0]])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    @staticmethod
    def _pad(n: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
        total = max((-(-n // stride) - 1) * stride + (kernel - 1) * dilation + 1 - n, 0)
        return total // 2, total - total // 2


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
    return nn.Sequential(
        *conv_norm(3, 8, 3), nn.ReLU(), *conv_norm(8, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(4, 5)
    )


def mobile() -> nn.Module:
    return nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU6(), inverted_residual(8, 8, 2, 1), inverted_residual(8, 12, 3, 2), *head(12))


def residual() -> nn.Module:
    def block(inputs: int, width: int, stride: int, shortcut: nn.Module) -> Residual:
        return Residual(nn.Sequential(*conv_norm(inputs, width, 3, stride), nn.ReLU(), *conv_norm(width, width, 3)), shortcut)

    projection = nn.Sequential(*conv_norm(8, 12, 1, 2))
    return nn.Sequential(
        *conv_norm(3, 8, 3), nn.ReLU(), block(8, 8, 1, nn.Identity()), block(8, 12, 2, projection), block(12, 16, 2, OptionA(4)), *head(16)
    )
