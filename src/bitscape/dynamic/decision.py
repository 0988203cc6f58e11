"""The bits that each image of a batch got, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitscape.cost.layers import NetworkProfile


@dataclass(frozen=True)
class Decision:
    """Bit-widths of every layer for every image; columns in the order of `NetworkProfile.layers`."""

    weight: Tensor
    """(n, layers)."""
    activation: Tensor
    """(n, layers)."""

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, images: Tensor | slice) -> "Decision":
        return Decision(self.weight[images], self.activation[images])

    def bitops(self, cost: NetworkProfile) -> Tensor:
        """BitOps (n,) of the layers; differentiable."""
        macs = torch.tensor([float(layer.macs) for layer in cost.layers], device=self.weight.device)
        return (self.weight * self.activation) @ macs

    def activation_bits(self, cost: NetworkProfile) -> Tensor:
        """Mean width (n,) of an image's activations, counted by elements as `policy_cost` does."""
        elements = torch.tensor([float(layer.input_elements) for layer in cost.layers], device=self.weight.device)
        return self.activation @ elements / elements.sum()

    def detach(self) -> "Decision":
        """The same numbers without gradient."""
        return Decision(self.weight.detach(), self.activation.detach())

    def rounded(self) -> "Decision":
        """The nearest whole widths."""
        return Decision(self.weight.round(), self.activation.round())


def joined(decisions: Sequence[Decision]) -> Decision:
    """The decisions of several batches as one."""
    return Decision(torch.cat([each.weight for each in decisions]), torch.cat([each.activation for each in decisions]))
