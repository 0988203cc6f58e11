"""The demo's network: a small residual one for 8x8 digits, with every kind of layer that quantization treats apart."""

from torch import Tensor, nn


class _Residual(nn.Module):
    """Two convolutions with norms, added to their input: both 3x3, or depthwise 3x3 then 1x1."""

    def __init__(self, channels: int, *, depthwise: bool) -> None:
        super().__init__()
        groups, kernel = (channels, 1) if depthwise else (1, 3)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu1(self.norm1(self.conv1(x)))
        total: Tensor = self.relu2(self.norm2(self.conv2(hidden)) + x)
        return total


class DigitsNet(nn.Module):
    """(n, 1, 8, 8) -> (n, 10) logits; 8 quantizable layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm_relu(1, 16, stride=1)
        self.block1 = _Residual(16, depthwise=False)
        self.down = _conv_norm_relu(16, 32, stride=2)
        self.block2 = _Residual(32, depthwise=True)
        self.widen = _conv_norm_relu(32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.down(self.block1(self.stem(x))))
        logits: Tensor = self.head(self.flatten(self.pool(self.widen(x))))
        return logits


def digits_net() -> nn.Module:
    """Return an untrained DigitsNet: 30,170 parameters, 0.47 M multiply-accumulates an image."""
    return DigitsNet()


def _conv_norm_relu(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
