"""The networks of published figures, written plainly: the tests need their shapes, never trained weights."""

from torch import Tensor, nn


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), the last relu optional."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, relu: bool = True) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    same = stride == 1 and inputs == outputs
    return nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    body = [*conv_norm(inputs, width, 3, stride), nn.ReLU(), *conv_norm(width, width, 3)]
    return Residual(nn.Sequential(*body), _shortcut(inputs, width, stride))


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    body = [*conv_norm(inputs, width, 1), nn.ReLU(), *conv_norm(width, width, 3, stride), nn.ReLU()]
    body += conv_norm(width, 4 * width, 1)
    return Residual(nn.Sequential(*body), _shortcut(inputs, 4 * width, stride))


def _head(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def resnet18() -> nn.Module:
    return _imagenet_resnet(basic_block, (2, 2, 2, 2), expansion=1)


def resnet50() -> nn.Module:
    return _imagenet_resnet(bottleneck, (3, 4, 6, 3), expansion=4)


def _imagenet_resnet(block, depths: tuple[int, ...], expansion: int) -> nn.Module:
    layers: list[nn.Module] = [*conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layers.append(block(inputs, 64 * 2**stage, stride=2 if stage and not index else 1))
            inputs = 64 * 2**stage * expansion
    return nn.Sequential(*layers, *_head(inputs, 1000))


def resnet20(classes: int = 100) -> nn.Module:
    """The CIFAR network with convolutions in its shortcuts."""
    layers: list[nn.Module] = [*conv_norm(3, 16, 3), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for index in range(3):
            layers.append(basic_block(inputs, width, stride=2 if width != 16 and not index else 1))
            inputs = width
    return nn.Sequential(*layers, *_head(inputs, classes))


def inverted_residual(inputs: int, outputs: int, expand: int, stride: int) -> nn.Module:
    hidden = inputs * expand
    body: list[nn.Module] = [*conv_norm(inputs, hidden, 1), nn.ReLU6()] if expand > 1 else []
    body += [*conv_norm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), *conv_norm(hidden, outputs, 1)]
    same = stride == 1 and inputs == outputs
    return Residual(nn.Sequential(*body), nn.Identity(), relu=False) if same else nn.Sequential(*body)


def mobilenetv2() -> nn.Module:
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    layers: list[nn.Module] = [*conv_norm(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for expand, outputs, depth, stride in stages:
        for index in range(depth):
            layers.append(inverted_residual(inputs, outputs, expand, stride if not index else 1))
            inputs = outputs
    return nn.Sequential(*layers, *conv_norm(inputs, 1280, 1), nn.ReLU6(), *_head(1280, 1000))
