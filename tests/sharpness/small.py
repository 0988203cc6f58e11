"""Small quantized networks, and a batch for them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.engine import Batch, BatchLoss
from bitscape.engine.step import Part
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.quantizers import Lsq, PerTensor, Quantizer


def whole(images: Tensor, labels: Tensor, loss: BatchLoss = functional.cross_entropy) -> Batch:
    """A batch in one part."""
    return Batch((Part(images, labels, loss, 1.0),))


def batch(images: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    return torch.randn(images, 2, 6, 6, generator=generator) + labels[:, None, None, None], labels


def float_net(*, norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        middle = nn.BatchNorm2d(4) if norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(2, 4, 3), middle, nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 3))


def quantized(net: nn.Module, *, bits: int = 3, quantizer: Quantizer | None = None, images: Tensor | None = None) -> nn.Module:
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    policy = Policy({name: LayerBits(bits, bits) for name in names})
    return calibrate(with_quantizers(net, policy, quantizer or Lsq()), batch()[0] if images is None else images)


def small_net(*, norm: bool = True, dropout: float = 0.0, bits: int = 3, quantizer: Quantizer | None = None) -> nn.Module:
    return quantized(float_net(norm=norm, dropout=dropout), bits=bits, quantizer=quantizer)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def regression(*, bias: bool = True) -> tuple[nn.Module, Tensor, Tensor, nn.Parameter | None]:
    """One quantized linear layer, and what it computes with: input (n, d), weight (3, d)."""
    torch.manual_seed(1)
    model = quantized(nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=bias)), quantizer=Lsq(weight_scales=PerTensor()))
    layer = model[1]
    return model, layer.input_quantizer(batch()[0].flatten(1)).detach(), layer.weight_quantizer(layer.weight).detach(), layer.bias


def half_squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels[:, None]).square().sum(1).mean() / 2
