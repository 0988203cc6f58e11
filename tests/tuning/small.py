"""A small residual network, quantized and repaired."""

import torch
from torch import Tensor, nn

from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, uniform_policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.quantizers import Lsq


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def float_net() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(Residual(4), Residual(4))
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    return nn.Sequential(nn.Conv2d(3, 4, 3), blocks, *ends).eval()


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def quantized(network: nn.Module, bits: int = 3, quantizer=Lsq()) -> nn.Module:  # noqa: B008
    policy = uniform_policy(layer_shapes(network), LayerBits(bits, 4))
    return calibrate(with_quantizers(network, policy, quantizer), images())
