import pytest
import torch
from torch import Tensor, nn

from bitscape.engine.spending import Spending, Spent, noting_spent
from bitscape.errors import BitscapeError


class ByValue(nn.Module):
    """Spends as many bits as an image's value, and ten BitOps a bit."""

    spent: Spent

    def forward(self, images: Tensor) -> Tensor:
        self.spent = Spent(bits=images[:, 0], bitops=10 * images[:, 0])
        return images


def test_every_batch_within_the_block_is_noted_in_order() -> None:
    network, values = ByValue(), torch.arange(5.0).view(5, 1)
    network(values)
    with noting_spent(network) as noted:
        for batch in values.split(2):
            network(batch)
    network(values)
    assert [spent.bits.tolist() for spent in noted] == [[0, 1], [2, 3], [4]]
    assert [spent.bitops.tolist() for spent in noted] == [[0, 10], [20, 30], [40]]
    assert all(spent.tiers is None for spent in noted) and not network._forward_hooks


class Purse(nn.Linear):
    """Calls something else `spent`."""

    spent = 3.5


@pytest.mark.parametrize("network", [nn.Linear(1, 1), Purse(1, 1)])
def test_nothing_is_noted_of_a_network_that_does_not_spend(network: nn.Module) -> None:
    with noting_spent(network) as noted:
        network(torch.ones(3, 1))
    assert noted == []


class ForTheBatch(ByValue):
    def forward(self, images: Tensor) -> Tensor:
        super().forward(images)
        self.spent = Spent(bits=self.spent.bits.sum(), bitops=self.spent.bitops)
        return images


def test_one_number_for_the_batch_is_refused_and_the_hook_is_gone() -> None:
    network = ForTheBatch()
    expected = r"spent\.bits has shape \(\) after 3 images; the network must set \(3,\)"
    with pytest.raises(BitscapeError, match=expected), noting_spent(network):
        network(torch.ones(3, 1))
    assert not network._forward_hooks


def test_a_network_spends_once_it_has_run() -> None:
    network = ByValue()
    assert not isinstance(network, Spending)
    network(torch.ones(2, 1))
    assert isinstance(network, Spending)
