"""Sam: descend along the gradient at the point of highest loss nearby.

Paper     Foret, Kleiner, Mobahi, Neyshabur: "Sharpness-aware minimization for efficiently improving generalization", ICLR 2021,
          arXiv 2010.01412; Kwon et al.: "ASAM", ICML 2021, arXiv 2102.11600; Liu et al.: "Towards efficient and scalable sharpness-aware
          minimization" (LookSAM), CVPR 2022, arXiv 2203.02714, for `reuse`.
Idea      Weights in a flat region keep their loss under small changes, such as those of other data or of rounding. So the loss that is
          lowered is the highest one within a small ball around the weights.
Computes  e = rho g / ||g||, one norm over all members of the ball (Eq. 2) -> sharpness.Ascent; gradient of L(w + e) -> SharpStep
Departs   In a quantized network the latent weights move and are quantized again: case 2 of SAQ's paper, which names its trouble, that a
          small e changes few codes. What `reuse` keeps is a part of the gradient of the ball's members, passed on to what is trained, as
          long in proportion as it was; LookSAM makes it 0.7 of the gradient always. Several workers keep the mean of theirs. Either
          form has harmed every network measured here: leave `reuse` off unless yours says otherwise.
Costs     two forward and backward passes a step, uncompiled, convolutions and linear layers in float32 also under autocast; with
          `interval` k one more pass every k-th step.
Measured  docs/results-flat-training: saq.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bitscape.engine import Batch, Step, StepRecord
from bitscape.engine.workers import mean
from bitscape.errors import BitscapeError, check_choices
from bitscape.quant.once import weights_quantized_once
from bitscape.sharpness import Ascent, Ball, random_state, repeating
from bitscape.sharpness.ball import TINY, MovedWeights
from bitscape.steps.attached import Attached


@dataclass(frozen=True, kw_only=True)
class SharpSettings(ABC):
    """What every sharpness-aware step is set by; `weights` says which weights it moves."""

    rho: float = 0.003
    """Radius of the ball: a share of the length of all its members, or with `relative=False` a length."""
    relative: bool = True
    """Measure `rho` by the network: lengths are not comparable between quantizers and networks."""
    adaptive: bool = False
    """ASAM: count lengths in units of |u| + 0.01 for weights and gains. `rho` is then 10 to 100 times larger."""
    norms: bool = True
    """Gains and biases of norms are in the ball; the paper's code leaves them out for transformers."""
    biases: bool = True
    """Biases of convolutions and linear layers are in the ball."""
    clips: bool = True
    """Learned ranges of quantized activations are in the ball; the paper's code leaves them out for transformers."""
    descent: Literal["perturbed", "sum"] = "perturbed"
    """Descend along the gradient at the perturbed point, or along the sum of both."""
    interval: int = 1
    """Perturb in every so many-th step only, plain steps between."""
    reuse: Literal["none", "orthogonal"] = "none"
    """Add to plain steps what the last perturbed gradient had across the plain one (LookSAM)."""
    reuse_share: float = 1.0
    """How much of it is added; 1: in the proportion to the plain gradient in which it was seen."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_choices(self)
        if not 0 <= self.rho < math.inf:
            raise BitscapeError(f"rho = {self.rho}: a radius of at least 0; shares of 0.0005 to 0.005 are usual")
        if self.interval < 1:
            raise BitscapeError(f"interval = {self.interval}: at least 1, which perturbs in every step; 5 or 10 are usual")
        if self.reuse != "none" and self.interval == 1:
            raise BitscapeError(f"reuse = {self.reuse!r} with interval = 1: there is no plain step to add to; give an interval of 5 or 10")
        if not 0 < self.reuse_share < math.inf:
            raise BitscapeError(f"reuse_share = {self.reuse_share}: it must be above 0; 1 adds what was seen")
        if self.relative and self.adaptive:
            raise BitscapeError("relative = True, adaptive = True: ASAM's lengths are relative by themselves; give relative=False")

    @property
    @abstractmethod
    def weights(self) -> MovedWeights:
        """What the ball holds of a layer's weight."""

    @property
    def ball(self) -> Ball:
        """What is perturbed."""
        return Ball(weights=self.weights, norms=self.norms, biases=self.biases, clips=self.clips, adaptive=self.adaptive)

    def build(self) -> Step:
        """Return the step of one run."""
        return SharpStep(settings=self)

    def attach(self, network: nn.Module) -> Attached:
        """Make the passes of `network` sharpness-aware in a loop of your own, with `ascent` of what is returned.

        Args:
            network: a quantized network, or what wraps it (DistributedDataParallel); trained as it is, on any device.

        Raises:
            BitscapeError: no quantized layer, something attached already, or settings that are the loop's: interval, reuse.
        """
        return Attached(self, network)

    def radius(self, ascent: Ascent) -> Tensor:
        """Length of the move along `ascent`, 0-d."""
        return self.rho * _length(ascent.values()) if self.relative else torch.as_tensor(self.rho)


@dataclass(frozen=True, kw_only=True)
class Sam(SharpSettings):
    """Settings of the sharpness-aware step on latent weights."""

    @property
    def weights(self) -> MovedWeights:
        """The latent weight itself."""
        return "latent"


@dataclass(kw_only=True)
class SharpStep:
    """Two passes over one batch: at the weights, and where the first pass says that the loss is highest."""

    settings: SharpSettings
    steps: int = 0
    """Steps done."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Member of the ball -> the part of its last perturbed gradient across the plain one, as a share of the plain one's length over all
    members; kept for `reuse` only."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepRecord:
        """Leave the gradient at the perturbed point in `.grad`, or on steps between two such the plain one."""
        sharp = self.steps % self.settings.interval == 0
        self.steps += 1
        return self._perturbed(model, batch) if sharp else self._plain(model, batch)

    def _perturbed(self, model: nn.Module, batch: Batch) -> StepRecord:
        with self._once(model):
            return self._passes(model, batch)

    def _once(self, model: nn.Module) -> AbstractContextManager[None]:
        """Only in the latent form do weights change between the passes, before their quantizers."""
        return nullcontext() if self.settings.weights == "latent" else weights_quantized_once(model)

    def _backward(self, model: nn.Module, batch: Batch) -> StepRecord:
        with self._once(model):  # at its end gradients reach the weights
            return batch.backward(model)

    def _passes(self, model: nn.Module, batch: Batch) -> StepRecord:
        settings, state = self.settings, random_state(model)
        with settings.ball.watched(model) as ascent:
            record = self._backward(model, batch)
        if settings.descent == "perturbed":
            model.zero_grad(set_to_none=True)
        rho = settings.radius(ascent)
        again = settings.ball.watched(model) if settings.reuse == "orthogonal" else nullcontext()
        with repeating(model, state), ascent.applied(ascent.factor(rho)), again as second:
            gap = self._backward(model, batch).loss - record.loss
        if second is not None:
            per_length = 1 / (_length(ascent.gradients) + TINY)
            # In the memory order that a checkpoint gives back: sums in another one have other bits.
            self.kept = {name: mean(part * per_length).contiguous() for name, part in across(second.gradients, ascent.gradients).items()}
        return replace(record, extras={"rho": rho, "gap": gap, **_predicted(ascent, rho, gap)})

    def _plain(self, model: nn.Module, batch: Batch) -> StepRecord:
        record = batch.backward(model)
        if self.kept:
            add_share(model, self.settings.ball, self.kept, self.settings.reuse_share)
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """Steps done, and what is kept for the plain ones."""
        return {"steps": torch.tensor(self.steps), **{f"kept.{name}": value for name, value in self.kept.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.steps = int(state["steps"])
        self.kept = {name.removeprefix("kept."): value for name, value in state.items() if name != "steps"}


def across(perturbed: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `perturbed` less its projection on `plain`, both as one vector over all members (LookSAM, Eq. 5)."""
    dot, square = (torch.stack([(each[name] * g).sum() for name, g in plain.items()]).sum() for each in (perturbed, plain))
    along = dot / square.clamp(min=TINY)
    return {name: perturbed[name] - along * g for name, g in plain.items()}


def add_share(model: nn.Module, ball: Ball, kept: Mapping[str, Tensor], share: float) -> None:
    """Add to `.grad` what `kept` gradients of the ball's members are there, times `share` and the length of what they are added to."""
    # In the order of the members: a checkpoint gives `kept` back in another one, whose sums have other bits.
    members = [(kept[name], member) for name, member in ball.members(model).items() if name in kept]
    parts = [pair for value, member in members for pair in member.passed_on(value.to(member.parameter.device))]
    parts = [(parameter, part) for parameter, part in parts if parameter.grad is not None]
    own = _length([p.grad for p, _ in parts if p.grad is not None])
    for parameter, part in parts:
        assert parameter.grad is not None
        parameter.grad += share * own * part


def _length(tensors: Mapping[str, Tensor] | list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(list(tensors.values()) if isinstance(tensors, Mapping) else tensors)


def _predicted(ascent: Ascent, rho: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """The gap as a share of its first-order prediction: near 1 for a small rho, near 0 if rounding erases the perturbation."""
    return {"ascent_norm": ascent.norm, "gap_of_predicted": gap / (rho * ascent.norm).clamp(min=TINY)}
