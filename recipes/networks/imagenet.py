"""Networks for ImageNet's 1,000 classes: MobileNets, SqueezeNet, and two ResNets without weights.

Sources: Howard et al., arXiv 1704.04861 (MobileNetV1); Sandler et al., arXiv 1801.04381 (MobileNetV2);
Iandola et al., arXiv 1602.07360 (SqueezeNet); He et al., arXiv 1512.03385 (ResNet).
"""

import torch
from torch import Tensor, nn

from recipes.networks.blocks import BlockB, BlockBuilder, Bottleneck, named, stage


def imagenet_resnet(block: BlockBuilder, channels: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Sequential:
    """Return a four-stage ResNet for (n, 3, 224, 224) and 1,000 classes, under torchvision's key names."""
    inputs = (64, *channels[:-1])
    stages = {
        f"layer{index + 1}": stage(block, inputs[index], channels[index], blocks[index], 1 if index == 0 else 2)
        for index in range(4)
    }
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    return named(
        conv1=stem, bn1=nn.BatchNorm2d(64), relu=nn.ReLU(), maxpool=nn.MaxPool2d(3, 2, padding=1), **stages,
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels[-1], 1000),
    )  # fmt: skip


def resnet18() -> nn.Sequential:
    """Return ImageNet's ResNet-18, 11,689,512 parameters."""
    return imagenet_resnet(BlockB, (64, 128, 256, 512), (2, 2, 2, 2))


def resnet50() -> nn.Sequential:
    """Return ImageNet's ResNet-50, stride in the 3x3 convolution, 25,557,032 parameters."""
    return imagenet_resnet(Bottleneck, (256, 512, 1024, 2048), (3, 4, 6, 3))


def same_conv(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> dict[str, nn.Module]:
    """Return a 3x3 convolution with TensorFlow's SAME padding, named "0", and its ReLU6.

    At stride 2 and an even side SAME pads right and below only. A module before the convolution does it, not a
    subclass of nn.Conv2d, so that replacing the convolution cannot lose it.
    """
    pad = {"pad": nn.ZeroPad2d((0, 1, 0, 1))} if stride == 2 else {}
    core = nn.Conv2d(inputs, outputs, 3, stride, padding=0 if stride == 2 else 1, groups=groups)
    return {**pad, "0": core, "1": nn.ReLU6()}


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise 3x3, project by 1x1; the input is added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = nn.Sequential(nn.Conv2d(inputs, wide, 1), nn.ReLU6())
        depthwise = named(**same_conv(wide, wide, stride, groups=wide))
        self.conv = nn.Sequential(*([expand] if expansion > 1 else []), depthwise, nn.Conv2d(wide, outputs, 1))
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.conv(x)
        return x + projected if self.adds_input else projected


def mobilenetv2_tfslim() -> nn.Sequential:
    """Return MobileNetV2 1.0 for (n, 3, 224, 224), norms folded into the convolutions, SAME padding."""
    features: list[nn.Module] = [named(**same_conv(3, 32, 2))]
    inputs = 32
    # Sandler et al., table 2: expansion, channels, blocks, stride.
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, blocks, first_stride in table:
        for index in range(blocks):
            features.append(InvertedResidual(inputs, outputs, first_stride if index == 0 else 1, expansion))
            inputs = outputs
    features.append(nn.Sequential(nn.Conv2d(320, 1280, 1), nn.ReLU6()))
    classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))
    pool = nn.AdaptiveAvgPool2d(1)
    return named(features=nn.Sequential(*features), pool=pool, flatten=nn.Flatten(), classifier=classifier)


def mobilenetv1_025_128() -> nn.Sequential:
    """Return MobileNetV1 0.25 for (n, 3, 128, 128), norms folded into the convolutions, SAME padding."""
    channels = (8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256)
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    layers: dict[str, nn.Module] = {"pad0": pad, "conv0": nn.Conv2d(3, 8, 3, 2), "relu0": nn.ReLU6()}
    for index, stride in enumerate(strides, start=1):
        inputs, outputs = channels[index - 1], channels[index]
        names = {"pad": f"dw{index}_pad", "0": f"dw{index}", "1": f"dw{index}_relu"}
        layers |= {names[name]: module for name, module in same_conv(inputs, inputs, stride, groups=inputs).items()}
        layers |= {f"pw{index}": nn.Conv2d(inputs, outputs, 1), f"pw{index}_relu": nn.ReLU6()}
    return named(**layers, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(256, 1000))


class Fire(nn.Module):
    """Squeeze by 1x1, then 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, squeezed: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.squeeze_activation = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeezed, outputs // 2, 1)
        self.expand1x1_activation = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeezed, outputs // 2, 3, padding=1)
        self.expand3x3_activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        sides = self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))
        return torch.cat(sides, dim=1)


def squeezenet1_1() -> nn.Sequential:
    """Return SqueezeNet 1.1 for (n, 3, 224, 224), under torchvision's key names."""
    features = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 128), Fire(128, 16, 128), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 256), Fire(256, 32, 256), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 384), Fire(384, 48, 384), Fire(384, 64, 512), Fire(512, 64, 512),
    )  # fmt: skip
    head = nn.Sequential(nn.Dropout(), nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return named(features=features, classifier=head, flatten=nn.Flatten())
