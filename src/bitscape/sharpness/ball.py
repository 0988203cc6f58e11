"""The ball: what sharpness-aware methods perturb, the gradient of it, and the move along that gradient.

Foret et al.: "Sharpness-aware minimization", ICLR 2021, arXiv 2010.01412 (Eq. 2: e = rho g / ||g||, one norm over all members);
Liu, Cai, Zhuang: "Sharpness-aware quantization", arXiv 2111.12273 (the member is Q(w), not w); Kwon et al.: "ASAM", ICML 2021,
arXiv 2102.11600 (e = rho T^2 g / ||T g||).

    with Ball().watched(model) as ascent:
        loss(model(images), labels).backward()
    model.zero_grad()
    with ascent.applied(ascent.factor(rho)):
        loss(model(images), labels).backward()

Layers are not touched: hooks on the weight quantizers see Q(w) and add e to it, so that the straight-through gradient of Q carries
dL/d(Q(w) + e) to the latent weight.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bitscape.errors import BitscapeError
from bitscape.models.layers import quantizable_layers
from bitscape.sharpness.members import Member, OfBoth, OfParameter, OfQuantizedWeight
from bitscape.sharpness.passes import faithful, in_float32

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
ETA = 0.01
"""ASAM's floor of T = |u| + ETA."""
TINY = 1e-12
"""Keeps a quotient finite where the norm it is divided by is zero."""
MovedWeights = Literal["quantized", "latent", "independent"]
"""What a ball holds of a layer's weight; see `Ball.weights`."""


class Ascent:
    """The gradient of the loss in every member of the ball; filled when the watched block ends, or by `gather`.

    Attributes:
        gradients: member's name -> dL/d(member), in its shape. Names are those of the parameters; "<layer>.weight" is the gradient in
            Q(w) where quantized weights are members. Under data parallelism it is this worker's own.
        norm: 0-d tensor on the device, ||g|| over all members, or ||T g|| of ASAM. Not finite if a gradient is not.
    """

    gradients: dict[str, Tensor]
    norm: Tensor

    def __init__(self, model: nn.Module, members: Mapping[str, Member], *, adaptive: bool) -> None:
        self._model = model
        self._members = members
        self._adaptive = adaptive
        layers = quantizable_layers(model).values()
        with in_float32(layers) as stack:
            for member in members.values():
                stack.enter_context(member.watched())
            self._hooks = stack.pop_all()

    @property
    def members(self) -> Mapping[str, Member]:
        """Name -> what is watched."""
        return self._members

    def close(self) -> None:
        """Watch no further backward pass."""
        self._hooks.close()

    def gather(self) -> None:
        """Take together what the members saw. Raises BitscapeError if none of them received a gradient."""
        self.close()
        self.gradients = {name: m.gradient for name, m in self._members.items() if m.gradient is not None}
        if not self.gradients:
            raise BitscapeError(
                f"model: none of the {len(self._members)} members of the ball received a gradient; call loss.backward() within the "
                "block, and take a ball with members that require a gradient"
            )
        scaled = self._directions = self.gradients
        if self._adaptive:
            scaled = {name: self._by_size(name, g) for name, g in self.gradients.items()}
            self._directions = {name: self._by_size(name, g) for name, g in scaled.items()}
        self.norm = torch.nn.utils.get_total_norm(list(scaled.values()))

    def _by_size(self, name: str, gradient: Tensor) -> Tensor:
        member = self._members[name]
        return (member.value().abs() + ETA) * gradient if member.is_gain else gradient

    def values(self) -> dict[str, Tensor]:
        """Member's name -> the tensor whose gradient was taken; not to be written to."""
        return {name: self._members[name].value() for name in self.gradients}

    def factor(self, rho: float | Tensor) -> Tensor:
        """What makes the move as long as `rho` (in units of T for ASAM): rho / norm, a 0-d tensor."""
        return rho / (self.norm + TINY)

    @contextmanager
    def applied(self, factor: float | Tensor) -> Iterator[None]:
        """Within the block every member is moved by factor * g (ASAM: factor * T^2 g), a constant; then it is as before, bit for bit.

        Run forward and backward inside; the same first pass may be applied several times.
        """
        with faithful(quantizable_layers(self._model).values()), ExitStack() as stack:
            for name, direction in self._directions.items():
                stack.enter_context(self._members[name].moved(direction * factor))
            yield


@dataclass(frozen=True, kw_only=True)
class Ball:
    """Which tensors a perturbation moves. Scales of weights and architecture logits are never among them, nor what is frozen."""

    weights: MovedWeights = "quantized"
    """What is moved along its own gradient: Q(w) (case 3 of the paper) or w (case 2); "independent" moves Q(w) along the gradient of w
    (case 1). A layer without quantizer has w alone."""
    norms: bool = True
    """Gains and biases of norms too."""
    biases: bool = True
    """Biases of convolutions and linear layers too."""
    clips: bool = False
    """Learned `clip` or `scale` of the layers' inputs too."""
    adaptive: bool = False
    """ASAM: lengths count in units of T, |u| + 0.01 for weights and gains, 1 for the rest."""

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[Ascent]:
        """Within the block backward passes are seen by the yielded ascent, which is ready once the block has ended.

        Backward passes add up (gradient accumulation), as do several runs of a layer in one pass. `.grad` is neither read nor
        changed. The network runs uncompiled, and its convolutions and linear layers in float32: see `passes.faithful`.

        Raises:
            BitscapeError: no member received a gradient.
        """
        with torch.compiler.set_stance("force_eager"):
            ascent = self.watch(model)
            try:
                yield ascent
            finally:
                ascent.close()
        ascent.gather()

    def watch(self, model: nn.Module) -> Ascent:
        """Return an ascent that sees backward passes until `Ascent.gather` or `Ascent.close`; hooks need uncompiled passes."""
        return Ascent(model, self.members(model), adaptive=self.adaptive)

    def members(self, model: nn.Module) -> dict[str, Member]:
        """Name -> member; each tensor once, under its first name."""
        found: dict[nn.Module | nn.Parameter, tuple[str, Member]] = {}
        for name, module, part in self._places(model):
            parameter = module._parameters.get(part)
            if parameter is None or not parameter.requires_grad:
                continue
            quantizer = module._modules.get("weight_quantizer") if part == "weight" and self.weights != "latent" else None
            key = parameter if quantizer is None else quantizer
            found.setdefault(key, (f"{name}.{part}".lstrip("."), self._member(parameter, quantizer, part)))
        return dict(found.values())

    def _places(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
        """Where parameters of the ball may be: name of the module, the module, name of the parameter in it."""
        layers = quantizable_layers(model)
        for name, module in model.named_modules():
            if name in layers or (self.norms and isinstance(module, NORMS)):
                yield name, module, "weight"
                if self.biases or name not in layers:
                    yield name, module, "bias"
            quantizer = module._modules.get("input_quantizer") if self.clips else None
            if quantizer is not None:
                yield from ((f"{name}.input_quantizer", quantizer, part) for part in ("clip", "scale"))

    def _member(self, parameter: nn.Parameter, quantizer: nn.Module | None, part: str) -> Member:
        if quantizer is None:
            return OfParameter(parameter=parameter, is_gain=part == "weight")
        kind = OfBoth if self.weights == "independent" else OfQuantizedWeight
        return kind(parameter=parameter, quantizer=quantizer, is_gain=True)
