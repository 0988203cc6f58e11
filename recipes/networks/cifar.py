"""Networks for (n, 3, 32, 32) images: ResNets with three kinds of blocks, and WRN-16-1."""

from functools import partial

from torch import nn

from recipes.networks.blocks import (
    BlockA,
    BlockB,
    BlockBuilder,
    LinearEndBlock,
    PreActivationBlock,
    conv,
    named,
    stage,
)


def cifar_resnet(block: BlockBuilder, blocks: int, **head: nn.Module) -> nn.Sequential:
    """Return a CIFAR ResNet of 6 * blocks + 2 layers for (n, 3, 32, 32), with 16, 32 and 64 channels."""
    return named(
        conv1=conv(3, 16, 3), bn1=nn.BatchNorm2d(16), relu=nn.ReLU(),
        layer1=stage(block, 16, 16, blocks, 1), layer2=stage(block, 16, 32, blocks, 2),
        layer3=stage(block, 32, 64, blocks, 2), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), **head,
    )  # fmt: skip


def resnet20() -> nn.Sequential:
    """Return ResNet-20, option A."""
    return cifar_resnet(BlockA, 3, linear=nn.Linear(64, 10))


def resnet32() -> nn.Sequential:
    """Return ResNet-32, option A."""
    return cifar_resnet(BlockA, 5, linear=nn.Linear(64, 10))


def resnet44() -> nn.Sequential:
    """Return ResNet-44, option A."""
    return cifar_resnet(BlockA, 7, linear=nn.Linear(64, 10))


def resnet20_apot() -> nn.Sequential:
    """Return ResNet-20, option B."""
    return cifar_resnet(BlockB, 3, fc=nn.Linear(64, 10))


def resnet_kc(depth: int, classes: int = 10) -> nn.Sequential:
    """Return the ResNet variant with a 64-channel stem and one ReLU per stage; depth is 8, 14, 20 or 32."""
    blocks = (depth - 2) // 6
    return named(
        conv1=conv(3, 64, 3), bn1=nn.BatchNorm2d(64), relu=nn.ReLU(),
        layer1=stage(LinearEndBlock, 64, 16, blocks, 1), relu1=nn.ReLU(),
        layer2=stage(LinearEndBlock, 16, 32, blocks, 2), relu2=nn.ReLU(),
        layer3=stage(LinearEndBlock, 32, 64, blocks, 2), relu3=nn.ReLU(),
        pool=nn.AvgPool2d(4), flatten=nn.Flatten(), linear=nn.Linear(256, classes),
    )  # fmt: skip


resnet8_kc = partial(resnet_kc, depth=8)
resnet14_kc = partial(resnet_kc, depth=14)
resnet8_kc_cifar100 = partial(resnet_kc, depth=8, classes=100)
resnet14_kc_cifar100 = partial(resnet_kc, depth=14, classes=100)
resnet20_kc = partial(resnet_kc, depth=20, classes=100)
resnet32_kc = partial(resnet_kc, depth=32, classes=100)


def wrn16_1_kc() -> nn.Sequential:
    """Return the wide ResNet 16-1 (pre-activation)."""
    stages = [stage(PreActivationBlock, *shape) for shape in ((16, 16, 2, 1), (16, 32, 2, 2), (32, 64, 2, 2))]
    layers = {f"layer{index}": named(layer=blocks) for index, blocks in enumerate(stages, start=1)}
    return named(
        conv1=conv(3, 16, 3), **layers, bn1=nn.BatchNorm2d(64), relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(64, 10),
    )  # fmt: skip
