"""A network whose layers choose softly among bit-widths, and the steps that train it."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from bitscape.cost.layers import NO_EFFECT
from bitscape.data.epochs import Rows
from bitscape.engine import Batch, Sgd, Step, StepRecord
from bitscape.engine.feed import Feed, for_all_workers
from bitscape.engine.forward import device_of
from bitscape.engine.settings import sgd_with_rate
from bitscape.engine.step import restore_step, step_state
from bitscape.quant.convert import batches_of, calibrate
from bitscape.quant.layers import quantized_layers
from bitscape.quant.mixture import Mixture, mix
from bitscape.searches.problem import SearchProblem
from bitscape.searches.proxy_task import ProxyTask
from bitscape.searches.sensitivity import candidate_widths
from bitscape.searches.soft_cost import SoftCost, soft_cost

CALIBRATION_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class MixtureSgd:
    """SGD with momentum; the logits of mixtures have a rate of their own and no decay."""

    sgd: Sgd
    """For weights, norms and scales."""
    logit_lr: float
    """For the logits."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer over the trainable parameters of `model`."""
        logits = [module.logits for module in model.modules() if isinstance(module, Mixture)]
        return sgd_with_rate(self.sgd, model, "logits", logits, self.logit_lr)


@dataclass(kw_only=True, eq=False)
class Mixed:
    """A network with mixtures, and what its soft choice costs."""

    model: nn.Module
    head: str
    """Name of the layer that computes the logits."""
    cost: SoftCost
    weights: list[Mixture]
    """The mixture of each group's weights."""
    inputs: list[Mixture]
    """The mixture of each group's inputs."""

    @torch.no_grad()
    def keep_budget(self) -> None:
        """Set the price of bits so that the expected cost is within the budget, exactly at it where bits are short."""
        weight_logits, activation_logits = (torch.stack([mixture.logits for mixture in of]) for of in (self.weights, self.inputs))
        for of, prices in zip((self.weights, self.inputs), self.cost.prices(weight_logits, activation_logits), strict=True):
            for mixture, price in zip(of, prices, strict=True):
                mixture.price.copy_(price)

    @torch.no_grad()
    def expected_cost(self) -> dict[str, float]:
        """Kind of cost -> share of its cap that is used."""
        return self.cost.expected(*(torch.stack([mixture.shares for mixture in of]) for of in (self.weights, self.inputs)))

    def logits(self) -> list[Tensor]:
        """The logits of all mixtures."""
        return [mixture.logits for mixture in (*self.weights, *self.inputs)]


@dataclass(kw_only=True)
class MixtureStep:
    """Gradient of the proxy's loss, at the soft choice that the budget allows."""

    mixed: Mixed = field(repr=False)

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """One pass."""
        self.mixed.keep_budget()
        return batch.backward(model)


@dataclass(kw_only=True)
class Alternating:
    """Weights learn from the batch at hand, logits from held-out images in turn: the two-level form of the search."""

    step: Step
    held_out: ProxyTask
    mixed: Mixed = field(repr=False)
    batch: int = field(default=0, init=False)

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Two runs of the inner step; each keeps the gradient of its own parameters."""
        record = self.step(model, batch)
        logits = {id(tensor) for tensor in self.mixed.logits()}
        others = [(parameter, parameter.grad) for parameter in model.parameters() if id(parameter) not in logits]
        model.zero_grad(set_to_none=True)
        self._on_held_out(model)
        for parameter, gradient in others:
            parameter.grad = gradient
        return record

    def _on_held_out(self, model: nn.Module) -> None:
        task, batches = self.held_out.task, cast(Rows, for_all_workers(self.held_out.batches))
        epoch, batch = divmod(self.batch, len(batches))
        feed = Feed(batches=batches, device=device_of(model), task=task)
        part = next(feed.epoch(epoch, start=batch)).part
        self.step(model, Batch.of(part.inputs, part.targets, self.held_out.loss, task=task))
        self.batch += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The held-out batch that is next, and what the inner step keeps."""
        return {"batch": torch.tensor(self.batch)} | {f"step.{name}": value for name, value in step_state(self.step).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.batch = int(state["batch"])
        restore_step(self.step, {name.removeprefix("step."): value for name, value in state.items() if name != "batch"})


def mixed_network(problem: SearchProblem, model: nn.Module) -> Mixed:
    """Mix every free layer of the float network `model` among the problem's widths; pinned layers take their bits."""
    weight_bits, activation_bits = candidate_widths(problem.choices.candidates)
    freedom = problem.choices.freedom
    groups = freedom.groups
    idle = dict.fromkeys(problem.network.uncalled, NO_EFFECT)
    network = mix(model, weight_bits, activation_bits, groups, {**idle, **freedom.pinned})
    calibrate(network, batches_of(problem.samples.first(CALIBRATION_IMAGES), network))
    layers = quantized_layers(network)
    firsts = [layers[group[0]] for group in groups]  # the layers of a group share their choice
    return Mixed(
        model=network,
        head=problem.network.ends[-1],
        cost=soft_cost(problem, weight_bits, activation_bits),
        weights=[cast(Mixture, layer.weight_quantizer) for layer in firsts],
        inputs=[cast(Mixture, layer.input_quantizer) for layer in firsts],
    )
