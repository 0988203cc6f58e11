"""Dqmq: bit-widths that follow the quality of the input, learned jointly with the network.

Paper     Wang, Guo, Guo, Zhang: "Data quality-aware mixed-precision quantization via hybrid reinforcement learning", arXiv 2302.04453
          (IEEE TNNLS 2024).
Idea      Images of different quality need different bits. A policy with few parameters decides, layer by layer, from what an image looks
          like; its discrete choice is relaxed to a continuous one, so that one backward pass trains network and policy together.
Computes  b = m + v xi, limited to low..high -> heads; Q(u; b) = (1-f) Q_floor + f Q_ceil -> widths.at_widths;
          L_task + lambda max(0, C(b)/C_ref - 1) + mu mean f(1-f) -> DqmqStep
Departs   No code was released and details are not available: all but the claims of the abstract is ours. Weights have static bits unless
          asked otherwise, which lets one batch hold images of different bits. "Hybrid" is the path-wise gradient through b, with an
          optional score-function term on the loss at whole bits. Widths are rounded, straight through, from the first step: a mixture of
          two is finer than either. Norms are left as training ends with them: new statistics cost a network that was trained on padded
          crops one to two points.
Costs     two quantizations of each activation wherever a width has a slope: 2.2 plain steps on a CPU; decisions cost 0.8 % of the BitOps of
          ResNet-20 at W3A3, more of a smaller network's.
Measured  docs/results-dynamic: dqmq. ResNet-20 on corrupted CIFAR-10, short schedules, three seeds: 0.7 points over searched
          static bits at W3A3 and at W4A4, 0.5 to 0.9 over random bits, 0.3 to 0.5 over uniform ones after equal epochs,
          behind after equal time. The varying width in training helps more than the image does.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitscape.dynamic.decision import Decision
from bitscape.dynamic.network import DynamicNetwork, Sampling
from bitscape.engine import Batch, Sgd, Step, StepRecord
from bitscape.engine.settings import sgd_with_rate
from bitscape.engine.step import Part, sum_of
from bitscape.errors import BitscapeError, check_choices
from bitscape.sharpness import random_state, repeating

SAMPLING: dict[str, Sampling] = {"pathwise": "continuous", "both": "continuous", "score": "whole", "gumbel": "gumbel"}
"""Estimator -> how widths are sampled."""


@dataclass(frozen=True, kw_only=True)
class Dqmq:
    """Settings of the step that trains a DynamicNetwork."""

    bitops: float
    """What an image may cost, static layers and the decision itself included; on the command line --budget."""
    budget_of: Literal["batch", "image"] = "batch"
    """Whether the mean over the batch is held to the budget, so that clean images may pay for degraded ones, or every image. Of a batch
    that is trained in parts, or by several workers, each part's mean is."""
    cost_weight: float = 2.0
    """Weight of the cost above the budget, as a share of the budget; reached at the end of `ramp`."""
    hardening_weight: float = 0.01
    """Weight of f (1 - f), which draws widths to whole numbers."""
    estimator: Literal["pathwise", "both", "score", "gumbel"] = "pathwise"
    """How heads learn from the loss: through the continuous width, by the score function at whole widths (REINFORCE), both, or through a
    whole width that is drawn by Gumbel-softmax."""
    score_weight: float = 0.1
    """Weight of the score-function term, where there is one."""
    warm_up: float = 0.0
    """Share of the run in which bits are drawn evenly, so that every width's scale is trained."""
    ramp: float = 0.2
    """Share of the run, after the warm-up, in which the cost's weight rises to its full value."""
    hard_from: float = 0.0
    """Share of the run after which sampled widths are rounded, straight through; more and more often until `hard_until`."""
    hard_until: float = 0.0
    """Share of the run after which all are rounded."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_choices(self)
        if not 0 < self.bitops < math.inf:
            raise BitscapeError(f"bitops = {self.bitops}: what an image may cost, above 0; policy_cost tells that of a policy")
        shares = {"warm_up": self.warm_up, "ramp": self.ramp, "hard_from": self.hard_from, "hard_until": self.hard_until}
        if not (all(0 <= share <= 1 for share in shares.values()) and self.warm_up + self.ramp <= 1 and self.hard_from <= self.hard_until):
            raise BitscapeError(f"{shares}: shares of the run; warm_up + ramp must not exceed 1, nor hard_from hard_until")
        weights = {"cost_weight": self.cost_weight, "hardening_weight": self.hardening_weight, "score_weight": self.score_weight}
        if not all(0 <= weight < math.inf for weight in weights.values()):
            raise BitscapeError(f"{weights}: each must be at least 0")

    def build(self) -> Step:
        """Return the step of one run."""
        return DqmqStep(settings=self)


@dataclass(frozen=True, kw_only=True)
class DqmqSgd:
    """SGD with momentum; the heads of a DynamicNetwork have a rate of their own and no decay."""

    sgd: Sgd = field(default_factory=Sgd)
    """For weights, norms and scales."""
    head_lr: float = 0.1
    """For the heads: they count in bits, and one width is a small share of the cost."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer over the trainable parameters of `model`."""
        return sgd_with_rate(self.sgd, model, "heads", _dynamic(model).heads.parameters(), self.head_lr)


@dataclass(kw_only=True)
class DqmqStep:
    """One pass at sampled widths: the task's loss, the cost above the budget, and what draws widths to whole numbers."""

    settings: Dqmq

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Leave the gradient of the whole objective in `.grad`."""
        network, settings = _dynamic(model), self.settings
        network.hardness = _risen(batch.progress, settings.hard_from, settings.hard_until)
        network.sampling = SAMPLING[settings.estimator]
        return sum_of([self._of_part(network, part, batch.progress) for part in batch.parts])

    def _of_part(self, network: DynamicNetwork, part: Part, done: float) -> StepRecord:
        settings = self.settings
        if done < settings.warm_up:
            with network.using(network.even(len(part))):
                outputs = part.outputs(network)
        else:
            outputs = part.outputs(network)
        value, decision, spent = part.loss(outputs, part.targets), network.decision, network.spent
        excess = self._excess(network, decision)
        objective = value
        if done >= settings.warm_up:
            weight = settings.cost_weight * _risen(done, settings.warm_up, settings.warm_up + settings.ramp)
            objective = objective + weight * excess + settings.hardening_weight * network.softness
            if settings.estimator in ("both", "score"):
                objective = objective + settings.score_weight * self._score_term(network, part, outputs, decision)
        (objective * part.share).backward()
        extras = {"bits": spent.bits.mean(), "bitops": spent.bitops.mean(), "excess": excess.detach()}
        return StepRecord(
            loss=value.detach() * part.share,
            sums=part.counted(outputs),
            extras={name: each * part.share for name, each in extras.items()},
        )

    def _excess(self, network: DynamicNetwork, decision: Decision) -> Tensor:
        """Cost above the budget, as a share of it."""
        used = (decision.bitops(network.cost) + network.decision_bitops) / self.settings.bitops
        above = used.mean() if self.settings.budget_of == "batch" else used
        return (above - 1).clamp(min=0).mean()

    def _score_term(self, network: DynamicNetwork, part: Part, logits: Tensor, decision: Decision) -> Tensor:
        """Raise the density of sampled decisions whose loss at whole bits is below the batch's mean (REINFORCE, with that baseline)."""
        if part.task.name != "classes":
            raise BitscapeError(
                f"estimator={self.settings.estimator!r} needs the loss of each label, and the task is {part.task.name!r}; "
                "use estimator='pathwise', which takes any task"
            )
        density = network.log_density
        with torch.no_grad():
            if network.sampling != "whole":
                with repeating(network, random_state(network)), network.using(decision.detach().rounded()):
                    logits = part.outputs(network)
            losses = functional.cross_entropy(logits, part.targets, reduction="none")
            advantage = (losses - losses.mean()) / losses.std(correction=0).clamp(min=1e-6)
        return (advantage * density).mean() / len(network.names)


def _risen(done: float, start: float, end: float) -> float:
    """From 0 at `start` to 1 at `end`."""
    return float(done >= end) if start == end else min(1.0, max(0.0, done - start) / (end - start))


def _dynamic(model: nn.Module) -> DynamicNetwork:
    if not isinstance(model, DynamicNetwork):
        raise BitscapeError(f"model is a {type(model).__name__}; this step and its optimizer are for what dynamic_network returns")
    return model
