"""Block reconstruction: block by block, codes and scales learn the float block's output.

Paper     Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu: "BRECQ: Pushing the Limit of Post-Training Quantization by Block
          Reconstruction", ICLR 2021, arXiv 2102.05426; Wei, Gong, Li, Liu, Yu: "QDrop: Randomly Dropping Quantization for
          Extremely Low-bit Post-Training Quantization", ICLR 2022, arXiv 2203.05740
Idea      A residual block is trained as one, since its layers make good each other's errors, and by itself, since a few
          hundred images say enough about one block. It sees the inputs that the quantized network gives it; a random half of
          its activations stays float, so that it does not fit the noise of just these images.
Computes  Algorithm 1 of BRECQ -> reconstruct; dropping as in QDrop -> Dropping
Departs   Rounding starts from compensated codes, whose positions move and are rounded straight through, instead of
          AdaRound's soft choice from the float weights: some hundred steps are enough. The plain squared error, without
          Fisher weights. The block's input is the quantized network's alone. A quarter of the images is held out: a
          block stays as it was unless its error falls there, and so does the network unless it follows the float
          network better.
Costs     For each block, a pass over the images in either network, and `steps` forward and backward passes over 4 to 32
          images; each block's inputs and outputs in memory.
Measured  MobileNetV1 0.25 at 128 pixels, bytes of 4-bit weights, 8-bit activations, 256 images, one run, before
          rounding went layer by layer: divergence from the float network on 744 test images 0.636 compensated, 0.566
          reconstructed (46.8 and 48.4 % of the float answers kept), in 45 s of process time. MobileNetV2 at the same
          bytes, 64 images, after rounding layer by layer: the errors of 12 of its first 17 blocks fall by 1 to 4 %,
          those of the other five rise and are taken back. Weights that were rounded in order leave little to learn.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import call
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine import Cosine
from bitscape.engine.checkpoint import (
    check_same_settings,
    check_same_tensors,
    load_checkpoint,
    restoring,
    save_checkpoint,
)
from bitscape.engine.describe import bits_of, describe
from bitscape.engine.rates import Position, Rates
from bitscape.engine.task import Task
from bitscape.errors import BitscapeError, at_least_one
from bitscape.folders import CHECKPOINT, locked
from bitscape.models.find import load_state
from bitscape.models.modes import evaluating
from bitscape.models.prepare import as_prepared
from bitscape.progress import track
from bitscape.quant.layers import quantized_layers
from bitscape.tuning.blocks import Block, find_blocks
from bitscape.tuning.guard import Guard
from bitscape.tuning.learning import EXAMPLE, Shuffled, relative_error
from bitscape.tuning.relaxed import Reach, relaxed

_log = logging.getLogger("bitscape.tuning")
REACH = Reach(scales=0.5, codes=1.0)
HELD_BYTES = 1 << 30
"""Of a block's inputs and outputs in memory: blocks of larger ones are trained on fewer samples."""
STEP_BYTES = 1 << 22
"""Of a block's inputs and outputs in a training step."""
FEWEST = 4
"""Samples of a step, however large their maps are."""
_AT_ONCE = 32
"""Samples that go through a network together."""


def reconstruct(
    model: nn.Module,
    float_model: nn.Module,
    samples: Samples,
    held_out: Samples,
    task: Task,
    *,
    steps: int = 80,
    batch_size: int = 32,
    reach: Reach = REACH,
    drop: float = 0.5,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Train the blocks of a quantized and repaired `model` in place, in the order of their calls; return it.

    Args:
        model: what `repair` returned, by LSQ or LSQ+.
        float_model: the network that was quantized, norms folded.
        samples: inputs that are learned from; targets are not used.
        held_out: other inputs, which decide whether the result is kept; none that rounding saw.
        task: what the outputs mean; it decides about the result alone.
        steps: of each block, at least 1.
        batch_size: most samples a step; of large maps fewer say as much, 4 at least.
        reach: how far codes and scales may come.
        drop: share of a block's activations that stay float in a training step, from 0 to below 1.
        seed: of the order of the samples, and of what is dropped.
        folder: where each block's checkpoint is kept; the same call goes on from there. None: nowhere.

    Raises:
        CheckpointError: the folder is of another run.
        BitscapeError: a quantizer other than LSQ's, outputs that are not the task's, or an argument out of range.
    """
    at_least_one(steps=steps, batch_size=batch_size)
    if not 0 <= drop < 1:
        raise BitscapeError(f"drop = {drop}: a share from 0 (none) to below 1; 0.5 is usual")
    float_model = as_prepared(float_model)
    guard = Guard(model, float_model, held_out, task)
    example = samples.first(EXAMPLE).parts[0].inputs
    blocks = find_blocks(model, example)
    most = _fitting(blocks)
    fitted, tested = (_Pairs(model, float_model, part.first(most)) for part in (samples, held_out))
    settings = {"steps": steps, "batch_size": batch_size, "reach": reach, "drop": drop, "seed": seed}
    made = _Checkpoint(folder, describe({**settings, "bits": bits_of(model), "start": float_model}))
    with made.locked(), relaxed(model, example) as relaxation:
        done = made.restore(model)
        for number, block in enumerate(track(blocks[done:], label="block reconstruction"), done + 1):
            pairs, unseen = fitted.of(block), tested.of(block)
            together = min(batch_size, max(FEWEST, STEP_BYTES // block.sample_bytes))
            optimizer = relaxation.optimizer(block.module, reach, steps)
            start = {name: value.clone() for name, value in block.module.state_dict().items()}
            before = _error(block.module, unseen)
            with dropping(block.module, drop):
                _train(block.module, Shuffled(Samples(pairs), together, seed), optimizer, steps, seed)
            after = _error(block.module, unseen)
            if not after < before:
                block.module.load_state_dict(start)
            _log.info("block %s: error on images held out %.4g -> %.4g", block.name, before, after)
            made.save(model, number)
    guard.decide("block reconstruction")
    return model.eval()


def _fitting(blocks: list[Block]) -> int:
    """Of how many samples a block's tensors in both networks are held."""
    largest = max((2 * block.sample_bytes for block in blocks), default=1)
    return max(2, HELD_BYTES // max(1, largest))


@torch.enable_grad()
def _train(
    module: nn.Module, data: Shuffled, optimizer: torch.optim.Optimizer, steps: int, seed: int
) -> None:
    rates = Rates(optimizer=optimizer, schedule=Cosine())
    batches = chain.from_iterable(map(data.epoch, count()))
    module.eval()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for step, (inputs, expected) in enumerate(islice(batches, steps)):
            rates.before_step(Position(step, steps, len(data)))
            optimizer.zero_grad()
            relative_error(module(inputs), expected).backward()
            optimizer.step()


class Dropping(nn.Module):
    """In the place of an activation's quantizer: a random share of the values stays float.

    The same values of every sample, since random numbers cost as much as the layer.
    """

    def __init__(self, quantizer: nn.Module, share: float) -> None:
        super().__init__()
        self.quantizer, self.share = quantizer, share

    def forward(self, x: Tensor) -> Tensor:
        """Return values, some of them quantized."""
        return torch.where(torch.rand_like(x[0]) < self.share, x, self.quantizer(x))


@contextmanager
def dropping(module: nn.Module, share: float) -> Iterator[None]:
    """Within the block the quantizers of the layers' inputs drop that share of their work."""
    layers = list(quantized_layers(module).values())
    quantizers = [layer.input_quantizer for layer in layers]
    for layer in layers:
        layer.input_quantizer = Dropping(layer.input_quantizer, share)
    try:
        yield
    finally:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.input_quantizer = quantizer


class _Pairs:
    """Samples on their way through both networks: what each quantized block takes, and the float one returns."""

    def __init__(self, model: nn.Module, float_model: nn.Module, samples: Samples) -> None:
        self.model, self.float_model, self.samples = model, float_model, samples
        self._before: nn.Module | None = None
        self._taken: list[Tensor] = []
        self._expected: list[Tensor] = []

    def of(self, block: Block) -> list[Minibatch]:
        """Inputs of the block, with the outputs expected of it as targets; blocks are asked for in order."""
        partner = self.float_model.get_submodule(block.name)
        if block.follows and self._before is not None:
            taken, float_taken = _run(self._before, self._taken), self._expected
        else:
            self._taken = self._expected = []  # before others take their memory
            taken = self._recorded(self.model, block.module)
            float_taken = self._recorded(self.float_model, partner)
        self._before, self._taken, self._expected = block.module, taken, _run(partner, float_taken)
        return list(map(Minibatch, self._taken, self._expected))

    def _recorded(self, network: nn.Module, module: nn.Module) -> list[Tensor]:
        """What `module` takes in the network, in batches."""
        taken: list[Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            taken.append(inputs[0].clone())
            raise _Reached

        handle = module.register_forward_pre_hook(stop)
        try:
            with evaluating(network):
                for batch in self.samples.batches(_AT_ONCE):
                    with suppress(_Reached):
                        call(network, batch.inputs)
        finally:
            handle.remove()
        return taken


class _Reached(Exception):
    """The pass has come as far as it must."""


def _run(module: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    # Clones, since a block may change its input in place.
    with evaluating(module):
        return [module(batch.clone()) for batch in batches]


def _error(module: nn.Module, pairs: list[Minibatch]) -> float:
    """Mean relative error of the block's outputs."""
    outputs = _run(module, [pair.inputs for pair in pairs])
    errors = [
        float(relative_error(output, pair.targets)) * len(pair)
        for output, pair in zip(outputs, pairs, strict=True)
    ]
    return sum(errors) / sum(map(len, pairs))


class _Checkpoint:
    """The network after each block, in a folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder) / "reconstruct"
        self._settings = settings

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder."""
        return nullcontext() if self._folder is None else locked(self._folder)

    def restore(self, model: nn.Module) -> int:
        """Return how many blocks are done, with which the network goes on."""
        if self._folder is None or not (path := self._folder / CHECKPOINT).exists():
            return 0
        tensors, header = load_checkpoint(path)
        with restoring(path):
            check_same_tensors(path, tensors, model.state_dict(), "model")
            check_same_settings(path, header["settings"], self._settings)
            load_state(model, tensors)
            _log.info("going on from %s after %d blocks", path, header["blocks"])
            return int(header["blocks"])

    def save(self, model: nn.Module, blocks: int) -> None:
        """Note that so many blocks are done."""
        if self._folder is not None:
            header = {"settings": self._settings, "blocks": blocks}
            save_checkpoint(self._folder / CHECKPOINT, model.state_dict(), header)
