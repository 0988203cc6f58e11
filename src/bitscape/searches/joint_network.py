"""One network that is trained at many policies: bits are drawn at every step.

All widths share the weights; each has a scale of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitscape.cost.layers import NO_EFFECT
from bitscape.cost.policy_cost import CAPS
from bitscape.data.streams import seed_of
from bitscape.engine import Batch, StepRecord
from bitscape.policy import LayerBits, Policy
from bitscape.quant.convert import batches_of, calibrate, with_quantizers
from bitscape.quant.layers import QuantizedLayer, quantized_layers
from bitscape.quant.switched import make_switched, use_bits
from bitscape.searches.choices import Choices
from bitscape.searches.problem import SearchProblem
from bitscape.searches.sensitivity import candidate_widths

CALIBRATION_IMAGES = 256
DECAY = 0.5
"""How much less often a width is drawn for each bit that it is away from the center."""

Pairs = tuple[LayerBits, ...]
"""The bits of each group of free layers."""


@dataclass(kw_only=True, eq=False)
class JointNetwork:
    """A quantized network whose free layers switch among the candidate widths."""

    model: nn.Module
    groups: list[list[QuantizedLayer]]
    """The layers of each group."""
    allowed: list[Pairs]
    """The pairs that each group may have, as far as the budget depends on them."""
    center: Pairs
    """Uniform bits within the budget: scores are of moves away from them."""
    widest: Pairs

    def use(self, pairs: Sequence[LayerBits]) -> None:
        """Switch every group to its pair."""
        for group, bits in zip(self.groups, pairs, strict=True):
            for layer in group:
                use_bits(layer, bits)

    def draw(self, generator: torch.Generator) -> Pairs:
        """A pair for each group, the likelier the nearer it is to the center."""
        drawn = []
        for pairs, about in zip(self.allowed, self.center, strict=True):
            away = [
                abs(bits.weight - about.weight) + abs(bits.activation - about.activation)
                for bits in pairs
            ]
            likelihood = DECAY ** torch.tensor(away, dtype=torch.float64)
            drawn.append(pairs[int(torch.multinomial(likelihood, 1, generator=generator))])
        return tuple(drawn)


def joint_network(problem: SearchProblem, model: nn.Module) -> JointNetwork:
    """Make the free layers of the float network `model` switch among the problem's widths.

    Pinned layers take their bits.
    """
    choices, (weight_bits, activation_bits) = (
        problem.choices,
        candidate_widths(problem.choices.candidates),
    )
    idle, any_bits = dict.fromkeys(problem.network.uncalled, NO_EFFECT), choices.candidates[0]
    free = dict.fromkeys(choices.free_layers, any_bits)
    network = with_quantizers(model, Policy({**idle, **choices.freedom.pinned, **free}))
    make_switched(network, choices.free_layers, weight_bits, activation_bits)
    calibrate(network, batches_of(problem.samples.first(CALIBRATION_IMAGES), network))
    layers = quantized_layers(network)
    about = center(choices)
    allowed = [
        _varied(choices, row, bits) for row, bits in zip(choices.allowed, about, strict=True)
    ]
    return JointNetwork(
        model=network,
        groups=[[layers[name] for name in group] for group in choices.freedom.groups],
        allowed=allowed,
        center=about,
        widest=tuple(max(pairs, key=_width) for pairs in allowed),
    )


def _varied(choices: Choices, row: NDArray[np.bool_], about: LayerBits) -> Pairs:
    """The pairs that a group may have.

    A width that no cap depends on stays as it is at the center.
    """
    capped = {side for kind in choices.budget.caps for side in CAPS[kind].widths(choices.network)}
    pairs = (bits for bits, may in zip(choices.candidates, row, strict=True) if may)
    return tuple(
        bits
        for bits in pairs
        if ("weight" in capped or bits.weight == about.weight)
        and ("activation" in capped or bits.activation == about.activation)
    )


def center(choices: Choices) -> Pairs:
    """The widest bits that fit the budget in every group alike.

    Where only other policies fit, it is one of those.

    Raises InfeasibleBudget if no policy fits.
    """
    alike = [
        choices.uniform(column)
        for column, bits in enumerate(choices.candidates)
        if bits in choices.offered
    ]
    policies = [choice for choice in alike if choices.holds(choice)] or [choices.first_feasible()]
    bits = [tuple(choices.candidates[column] for column in choice) for choice in policies]
    return max(bits, key=lambda pairs: min(map(_width, pairs)))


def _width(bits: LayerBits) -> tuple[int, int]:
    """What makes a pair wide: its smaller width, then both together."""
    return min(bits.weight, bits.activation), bits.weight + bits.activation


@dataclass(kw_only=True)
class JointStep:
    """The mean gradient at three policies: widest bits, bits drawn near the center, center."""

    network: JointNetwork = field(repr=False)
    seed: int
    steps: int = field(default=0, init=False)

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Three passes; the record is that of the center."""
        generator = torch.Generator().manual_seed(seed_of("joint", self.seed, self.steps))
        policies = self.network.widest, self.network.draw(generator), self.network.center
        for pairs in policies:
            self.network.use(pairs)
            record = batch.backward(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(len(policies))
        self.steps += 1
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """How many steps were made, which decides what is drawn."""
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.steps = int(state["steps"])
