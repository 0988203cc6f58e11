"""Optimizers and the learning-rate schedule, as settings that build the torch objects."""

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from bitscape.engine.describe import describe
from bitscape.errors import BitscapeError

MOST_RATE = 1e6
"""Of learning rates and decays: no training is that fast, and torch fails on numbers beyond float32."""


@runtime_checkable
class OptimizerSettings(Protocol):
    """Settings that build a torch optimizer over a model's trainable parameters.

    A dataclass, so that a checkpoint can tell them from others by its fields.
    """

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent with momentum."""

    lr: float = 0.01
    """Learning rate at the schedule's top."""
    momentum: float = 0.9
    """Share of the last update that is kept, in [0, 1)."""
    nesterov: bool = True
    """Evaluate the momentum ahead of the step; needs momentum > 0."""
    weight_decay: float = 1e-4
    """L2 penalty on weights of two or more dimensions; never on scales, clips, biases and norms."""
    quantizer_lr: float | None = None
    """Learning rate of the fake quantizers' parameters; None = `lr`."""

    def __post_init__(self) -> None:
        """Check every field."""
        _check_rates(self.lr, self.quantizer_lr, self.weight_decay)
        _check("momentum", self.momentum, 0.0 <= self.momentum < 1.0, "in [0, 1)")
        if self.nesterov and self.momentum == 0.0:
            raise BitscapeError("nesterov=True needs momentum > 0, and momentum is 0; pass nesterov=False")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer over the trainable parameters of `model`."""
        groups = parameter_groups(model, self.lr, self.weight_decay, self.quantizer_lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=_fuse(model))


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = 1e-3
    """Learning rate at the schedule's top."""
    beta1: float = 0.9
    """Decay of the gradient's running mean, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the squared gradient's running mean, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.05
    """Decay of weights of two or more dimensions; never of scales, clips, biases and norms."""
    quantizer_lr: float | None = None
    """Learning rate of the fake quantizers' parameters; None = `lr`."""

    def __post_init__(self) -> None:
        """Check every field."""
        _check_rates(self.lr, self.quantizer_lr, self.weight_decay)
        _check("beta1", self.beta1, 0.0 <= self.beta1 < 1.0, "in [0, 1)")
        _check("beta2", self.beta2, 0.0 <= self.beta2 < 1.0, "in [0, 1)")
        _check("eps", self.eps, 0.0 < self.eps <= MOST_RATE, f"> 0 and at most {MOST_RATE:g}")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer over the trainable parameters of `model`."""
        groups = parameter_groups(model, self.lr, self.weight_decay, self.quantizer_lr)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=_fuse(model))


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine, both per step (Loshchilov and Hutter, arXiv 1608.03983, no restarts)."""

    warmup_epochs: float = 0.0
    """Epochs, also fractions, over which the rate rises linearly from near 0."""
    final: float = 0.0
    """Share of the learning rate that would be reached one step after the last, in [0, 1]."""

    def __post_init__(self) -> None:
        """Check every field."""
        _check("warmup_epochs", self.warmup_epochs, 0.0 <= self.warmup_epochs < math.inf, ">= 0")
        _check("final", self.final, 0.0 <= self.final <= 1.0, "in [0, 1]")

    def factor(self, step: int, *, steps: int, steps_per_epoch: int) -> float:
        """Return what the learning rate is multiplied by at `step` of `steps`, both counted over all epochs."""
        warmup = min(round(self.warmup_epochs * steps_per_epoch), steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(steps - warmup, 1)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise BitscapeError unless the optimizer holds parameters of the model, and updates them without a closure."""
    own = {id(parameter) for parameter in model.parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    name = type(optimizer).__name__
    if foreign:
        raise BitscapeError(
            f"optimizer: the {name} has {len(foreign)} parameters that the network does not have, first one of shape "
            f"{tuple(foreign[0].shape)}; build it on this network's parameters, after bitscape.quantize"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise BitscapeError(f"optimizer: {name} evaluates the loss by itself (step(closure)); use another, e.g. torch.optim.AdamW")


def describe_optimizer(optimizer: OptimizerSettings | torch.optim.Optimizer) -> Any:
    """Return the settings of an optimizer as JSON data."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return describe(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return {"kind": type(optimizer).__name__, "parameters": sizes, **describe(optimizer.defaults)}


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, quantizer_lr: float | None) -> list[dict[str, Any]]:
    """Split the trainable parameters into weights (decayed), vectors and scalars, and fake quantizers' parameters.

    Groups carry a `name` ("weights", "vectors", "quantizers"); empty ones are left out.
    Raises BitscapeError when nothing in the model is trainable.
    """
    quantizers = {id(parameter) for parameter in _quantizer_parameters(model)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise BitscapeError("model has no trainable parameter; call model.requires_grad_(True) before training")
    free = [parameter for parameter in trainable if id(parameter) not in quantizers]
    own = [parameter for parameter in trainable if id(parameter) in quantizers]
    groups = [
        {"name": "weights", "params": [p for p in free if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"name": "vectors", "params": [p for p in free if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"name": "quantizers", "params": own, "lr": lr if quantizer_lr is None else quantizer_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def sgd_with_rate(sgd: Sgd, model: nn.Module, name: str, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of `sgd` in which `parameters` are a group `name` with a rate of their own and no decay."""
    own = {id(parameter): parameter for parameter in parameters if parameter.requires_grad}
    groups = parameter_groups(model, sgd.lr, sgd.weight_decay, sgd.quantizer_lr)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    groups.append({"name": name, "params": list(own.values()), "lr": lr, "weight_decay": 0.0})
    kept = [group for group in groups if group["params"]]
    return torch.optim.SGD(kept, lr=sgd.lr, momentum=sgd.momentum, nesterov=sgd.nesterov, fused=_fuse(model))


def _quantizer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if getattr(module, "is_fake_quantizer", False) is True:
            yield from module.parameters()


def _fuse(model: nn.Module) -> bool:
    # Only the fused CUDA kernels can skip an update by a flag on the device; on the CPU the flag is read for free.
    return all(parameter.is_cuda for parameter in model.parameters())


def _check_rates(lr: float, quantizer_lr: float | None, weight_decay: float) -> None:
    _check("lr", lr, 0.0 < lr <= MOST_RATE, f"> 0 and at most {MOST_RATE:g}")
    _check("weight_decay", weight_decay, 0.0 <= weight_decay <= MOST_RATE, f"from 0 to {MOST_RATE:g}")
    if quantizer_lr is not None:
        _check("quantizer_lr", quantizer_lr, 0.0 <= quantizer_lr <= MOST_RATE, f"from 0 to {MOST_RATE:g}, or None for `lr`")


def _check(name: str, value: float, allowed: bool, rule: str) -> None:
    if not allowed:
        raise BitscapeError(f"{name} is {value}; it must be {rule}")


def check_rates(**rates: float) -> None:
    """Raise BitscapeError unless every learning rate is above 0 and at most `MOST_RATE`."""
    for name, rate in rates.items():
        if not 0 < rate <= MOST_RATE:
            raise BitscapeError(f"{name} = {rate}: it must be above 0 and at most {MOST_RATE:g}")
