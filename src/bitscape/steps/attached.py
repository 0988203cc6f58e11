"""Sharpness-aware passes in a training loop of the user's own: the arithmetic of `SharpStep`, in a `with` block.

    saq = Saq().attach(network)
    for inputs, targets in loader:
        loss_of(network(inputs), targets).backward()
        with saq.ascent():  # weights are where the loss is highest
            loss_of(network(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from bitscape.errors import BitscapeError
from bitscape.quant.layers import quantized_layers
from bitscape.sharpness import Ascent, random_state, repeating
from bitscape.sharpness.members import OfQuantizedWeight
from bitscape.sharpness.passes import RandomState, UncopiedHook, set_random_state

if TYPE_CHECKING:
    from bitscape.steps.sam import SharpSettings


class Attached:
    """What `Saq().attach(network)` returns: it watches passes of a network, and moves its weights for the second ones.

    Copies of the network, and files of it, are free of it. Raises BitscapeError for a network without quantized layers, one
    that something is attached to, and settings that a loop decides on.
    """

    def __init__(self, settings: "SharpSettings", network: nn.Module) -> None:
        _check(settings, network)
        self._settings, self._network = settings, network
        self._inside: bool
        self._passes: int
        self._seen: Ascent
        self._start()
        self._handle = network.register_forward_pre_hook(UncopiedHook(self._before_pass))

    def detach(self) -> None:
        """Leave the network alone; `attach` may be called again."""
        self._seen.close()
        self._handle.remove()

    @contextmanager
    def ascent(self) -> Iterator[None]:
        """Within the block the weights are where the first passes say that the loss is highest; then they are back, bit for bit.

        Run the same forward and backward passes in the block as before it: all parts of a batch whose gradients add up. `.grad`
        is emptied at the start, and holds the gradient to descend along at the end (with `descent="sum"` that of both). Dropout
        repeats its masks, and running statistics count the batch once. Under data parallelism every worker ascends by itself.

        Raises:
            BitscapeError: no backward pass before the block or in it, a block within a block, gradients of an earlier step in
                `.grad`, or a forward that hooks do not reach, such as a compiled one.
        """
        if self._inside:
            raise BitscapeError("ascent: it is open already; end the block before the next one, which needs a backward pass first")
        ascent = self._seen
        self._check_first_pass()
        ascent.gather()
        if self._settings.descent == "perturbed":
            self._network.zero_grad(set_to_none=True)
        at_entry = random_state(self._network)
        self._inside, self._passes = True, 0
        try:
            with repeating(self._network, at_entry), ascent.applied(ascent.factor(self._settings.radius(ascent))):
                yield
            self._check_second_pass()
        finally:
            set_random_state(at_entry)
            self._start()

    def _start(self) -> None:
        """Watch the passes of the next step."""
        self._inside, self._passes = False, 0
        self._states: list[RandomState] = []
        self._seen = self._settings.ball.watch(self._network)
        self._versions = self._present_versions()

    def _before_pass(self, _network: nn.Module, _inputs: object) -> None:
        if not torch.is_grad_enabled():
            return
        if not self._inside:
            if self._is_over():
                self._seen.close()
                self._start()
            self._states.append(random_state(self._network))
        elif self._passes < len(self._states):
            set_random_state(self._states[self._passes])
        self._passes += 1

    def _is_over(self) -> bool:
        """Whether the passes seen so far belong to an earlier step, which ended without an ascent."""
        if self._present_versions() != self._versions:
            return True
        return self._has_gradient() and all(member.parameter.grad is None for member in self._seen.members.values())

    def _present_versions(self) -> dict[str, tuple[int, int]]:
        """Member -> which parameter it is, and how often that was written to."""
        members = self._settings.ball.members(self._network)
        return {name: (id(member.parameter), member.parameter._version) for name, member in members.items()}

    def _has_gradient(self) -> bool:
        return any(member.gradient is not None for member in self._seen.members.values())

    def _check_first_pass(self) -> None:
        members = list(self._seen.members.values())
        if not self._has_gradient():
            raise BitscapeError("ascent: no backward pass since the last step; call loss.backward() before the block")
        quantized = [member for member in members if isinstance(member, OfQuantizedWeight)]
        if quantized and all(member.gradient is None for member in quantized):
            raise BitscapeError(
                "ascent: no quantized weight received a gradient; a compiled forward passes hooks by: run the first pass within "
                'torch.compiler.set_stance("force_eager"), or call the network that is not compiled'
            )
        if not self._states:
            raise BitscapeError("ascent: the passes before the block did not call the network itself; attach to the module that you call")
        left_over = [member.left_over for member in members if member.left_over is not None]
        if left_over and bool(torch.stack([flag.cpu() for flag in left_over]).any()):
            raise BitscapeError(
                "ascent: .grad held gradients before the first backward pass, and they would be lost; call optimizer.zero_grad() "
                "after each step. To accumulate parts of a batch, run all of them before the block, and all of them again within it"
            )

    def _check_second_pass(self) -> None:
        emptied = self._settings.descent == "perturbed"
        if not self._passes or (emptied and all(p.grad is None for p in self._network.parameters())):
            raise BitscapeError("ascent: no backward pass in the block; run the same passes in it as before it")


def _check(settings: "SharpSettings", network: nn.Module) -> None:
    if settings.interval != 1 or settings.reuse != "none":
        raise BitscapeError(
            f"interval = {settings.interval}, reuse = {settings.reuse!r}: your loop decides which steps are sharp: leave both "
            "out, and enter the block of `ascent` in every so many-th step"
        )
    if settings.weights != "latent" and not quantized_layers(network):
        raise BitscapeError(
            "network: it has no quantized layer; call bitscape.quantize(model, policy, data, for_training=True) first, or take "
            "bitscape.steps.Sam for a float network"
        )
    hooks = (hook for module in network.modules() for hook in module._forward_pre_hooks.values())
    if any(isinstance(getattr(getattr(hook, "hook", None), "__self__", None), Attached) for hook in hooks):
        raise BitscapeError("network: something is attached to it already; call its detach() first")
