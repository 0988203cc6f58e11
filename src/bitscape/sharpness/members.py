"""One tensor of a ball: a parameter, or the weight of a layer after its quantizer. How its gradient is seen, and how it is moved."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitscape.sharpness.passes import UncopiedHook


@dataclass(kw_only=True)
class Member(ABC):
    """What the watched passes saw of one tensor, and the means to move it."""

    parameter: nn.Parameter
    """The tensor itself, or the latent weight that it is made from."""
    is_gain: bool
    """A weight or a norm's gain: ASAM measures it by its size."""
    gradient: Tensor | None = None
    """Sum over the backward passes watched."""
    left_over: Tensor | None = None
    """0-d, whether the parameter's `.grad` was not zero before the first of them; None if there was no `.grad`."""

    @abstractmethod
    def value(self) -> Tensor:
        """The tensor whose gradient is taken, as the watched pass used it."""

    @abstractmethod
    def watched(self) -> RemovableHandle:
        """Add the gradients of backward passes to `gradient` until the handle is removed."""

    @abstractmethod
    def moved(self, step: Tensor) -> AbstractContextManager[object]:
        """Within the block the tensor has `step` added; afterwards it is what it was, bit for bit."""

    @abstractmethod
    def freed(self) -> AbstractContextManager[Tensor]:
        """Within the block the network depends on the yielded leaf as it does on the tensor."""

    @abstractmethod
    def passed_on(self, gradient: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield what a `gradient` in the tensor is in the trained parameters behind it: straight through, where there is a quantizer."""

    def add(self, gradient: Tensor) -> None:
        """Take in the gradient of one backward pass."""
        if self.gradient is not None:
            self.gradient.add_(gradient)
            return
        # Copies: autograd may keep and change the tensor that it hands over, and adds to `.grad` in place.
        self.gradient = gradient.clone()
        self.left_over = None if self.parameter.grad is None else self.parameter.grad.any()


@dataclass(kw_only=True)
class OfParameter(Member):
    """A parameter, moved in place."""

    def value(self) -> Tensor:
        return self.parameter.detach()

    def watched(self) -> RemovableHandle:
        return self.parameter.register_hook(self.add)  # type: ignore[no-any-return]  # torch's is untyped

    @contextmanager
    def moved(self, step: Tensor) -> Iterator[None]:
        saved = self.parameter.detach().clone()
        try:
            with torch.no_grad():
                self.parameter.add_(step)
            yield
        finally:
            with torch.no_grad():
                self.parameter.copy_(saved)  # (w + e) - e is not w in floats

    @contextmanager
    def freed(self) -> Iterator[Tensor]:
        yield self.parameter

    def passed_on(self, gradient: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        yield self.parameter, gradient


@dataclass(kw_only=True)
class OfQuantizedWeight(Member):
    """What a weight quantizer returns. A sum after it leaves the quantizer's own backward pass as it is."""

    quantizer: nn.Module
    seen: Tensor | None = None

    def value(self) -> Tensor:
        assert self.seen is not None
        return self.seen

    def watched(self) -> RemovableHandle:
        return self.quantizer.register_forward_hook(UncopiedHook(self._see))

    def _see(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        self.seen = output.detach()
        if not output.requires_grad:
            return output
        # An alias: a bypassed quantizer returns the parameter itself, whose hook gets the sum of all uses, at each of them.
        alias = output.view_as(output)
        alias.register_hook(self.add)
        return alias

    def moved(self, step: Tensor) -> RemovableHandle:
        return _added(self.quantizer, step)

    def freed(self) -> AbstractContextManager[Tensor]:
        return _free_offset(self.quantizer, self.parameter)

    def passed_on(self, gradient: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        behind = [p for p in (self.parameter, *self.quantizer.parameters()) if p.requires_grad]
        found = torch.autograd.grad(self.quantizer(self.parameter), behind, gradient, allow_unused=True)
        yield from ((parameter, each) for parameter, each in zip(behind, found, strict=True) if each is not None)


@dataclass(kw_only=True)
class OfBoth(Member):
    """The gradient of the latent weight, by which the quantized one is moved."""

    quantizer: nn.Module

    def value(self) -> Tensor:
        return self.parameter.detach()

    def watched(self) -> RemovableHandle:
        return self.parameter.register_hook(self.add)  # type: ignore[no-any-return]  # torch's is untyped

    def moved(self, step: Tensor) -> RemovableHandle:
        return _added(self.quantizer, step)

    def freed(self) -> AbstractContextManager[Tensor]:
        return _free_offset(self.quantizer, self.parameter)

    def passed_on(self, gradient: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        yield self.parameter, gradient


def _added(quantizer: nn.Module, step: Tensor) -> RemovableHandle:
    return quantizer.register_forward_hook(lambda _module, _inputs, output: output + step)


@contextmanager
def _free_offset(quantizer: nn.Module, like: Tensor) -> Iterator[Tensor]:
    offset = torch.zeros_like(like, requires_grad=True)
    with _added(quantizer, offset):
        yield offset
