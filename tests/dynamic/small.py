"""Small dynamic networks, and images of two qualities for them."""

import torch
from torch import Tensor, nn

from bitscape.dynamic.build import dynamic_network
from bitscape.dynamic.decision import Decision
from bitscape.dynamic.network import DynamicBits, DynamicNetwork
from bitscape.policy import LayerBits, Policy
from bitscape.quant.quantizers import Lsq, Quantizer

STATIC = LayerBits(8, 8)
NAMES = ("0", "3", "6", "11")
"""The layers of `float_net`, in order; the outer two are static by default."""


def mixed_images(count: int = 16, size: int = 8, seed: int = 0) -> Tensor:
    """(count, 3, size, size): smooth ramps; noise lies on every second one."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(-1, 1, size)
    slopes = torch.randn(count, 3, 2, 1, 1, generator=generator)
    clean = slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None]
    noise = torch.randn(count, 3, size, size, generator=generator)
    noise[::2] = 0
    return clean + noise


def float_net(*, norm: bool = True, bias: bool = False, channels: int = 8, seed: int = 0) -> nn.Sequential:
    """Four layers: 3x3, grouped 3x3, 3x3 of stride 2, linear."""

    def conv(inputs: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, channels, 3, stride, padding=1, groups=groups, bias=bias)
        return [layer, nn.BatchNorm2d(channels) if norm else nn.Identity(), nn.ReLU()]

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *conv(3), *conv(channels, groups=2), *conv(channels, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
        )


def policy_of(model: nn.Module, weight: int = 4) -> Policy:
    """8/8 for the outer layers, `weight` bits for the weights of the others."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return Policy({name: STATIC if name in (names[0], names[-1]) else LayerBits(weight, 8) for name in names})


def dynamic(
    bits: DynamicBits | None = None, *, net: nn.Module | None = None, quantizer: Quantizer | None = None, images: Tensor | None = None
) -> DynamicNetwork:
    """In eval mode, its heads as they start."""
    net = float_net() if net is None else net
    made = dynamic_network(
        net, policy_of(net), mixed_images() if images is None else images, DynamicBits() if bits is None else bits, quantizer or Lsq()
    )
    return made.eval()


def set_heads(network: DynamicNetwork, *, middle: float, spread: float = -20.0) -> None:
    """Let every head say `middle`, whatever the image; `spread` is before the softplus, and by default leaves the least deviation."""
    with torch.no_grad():
        for head in network.heads:
            decisions = len(head.linear.bias) // 2
            head.linear.weight.zero_()
            head.linear.bias.copy_(torch.tensor([middle, spread]).repeat_interleave(decisions))


def vary_heads(network: DynamicNetwork, *, slope: float = 1.0, seed: int = 0) -> DynamicNetwork:
    """Let the heads' decisions depend on the image features: each takes a random direction, about the middle of the limits."""
    generator = torch.Generator().manual_seed(seed)
    set_heads(network, middle=(network.bits.low + network.bits.high) / 2)
    with torch.no_grad():
        for head in network.heads:
            decisions = len(head.linear.bias) // 2
            head.linear.weight[:decisions, :3] = slope * torch.randn(decisions, 3, generator=generator)
    return network


def whole_widths(network: DynamicNetwork, images: int, seed: int = 0) -> Decision:
    """Random whole widths within the limits."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return network.even(images)
