import pytest
import torch
from torch import nn

from bitscape.cost.layers import measure
from bitscape.models.products import MatMul
from bitscape.report.layer_kinds import kind_of


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (nn.Conv2d(1, 4, 3), (1, 8, 8), "convolution"),
        (nn.Conv2d(4, 2, 1), (4, 8, 8), "1×1 convolution"),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 8, 8), "depthwise convolution"),
        (nn.Conv2d(4, 4, 1, groups=2), (4, 8, 8), "grouped convolution"),
        (nn.ConvTranspose1d(4, 4, 2), (4, 8), "transposed convolution"),
        (nn.Linear(4, 2), (4,), "linear layer"),
    ],
)
def test_layers_are_called_by_what_they_compute(
    module: nn.Module, shape: tuple[int, ...], kind: str
) -> None:
    assert kind_of(measure(module, shape).layers[0]) == kind


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = MatMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, x.transpose(1, 2))


def test_a_product_of_activations_has_no_weight() -> None:
    assert kind_of(measure(Squared(), (2, 3)).layers[0]) == "product of activations"
