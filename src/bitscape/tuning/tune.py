"""Tuning: scales, biases and codes learn the float network's outputs from images without labels.

Paper     Finkelstein, Fuchs, Tal, Grobman, Vosco, Meller: "QFT: Post-training quantization via fast joint finetuning of all
          degrees of freedom", ECCV workshops 2022, arXiv 2212.02634
Idea      After rounding, every parameter that the deployed network has is trained a little towards the float network: what
          one layer does wrong, the others can make good.
Computes  section 3 -> tune; the trained form of a weight -> CodesAndScales
Departs   Rounding starts from compensated codes, not from the float weights. The loss is the task's divergence of the
          network's outputs, plus the squared error of every layer's output relative to its variance: with a few hundred
          images the outputs alone are learned by heart. Rates are shares of each parameter's own size. A quarter of the
          images is held out: the network is returned as it was unless it follows the float network better there.
Costs     epochs * (a float forward pass, a quantized forward and backward pass) over the images.
Measured  MobileNetV1 0.25 at 128 pixels, bytes of 4-bit weights, 8-bit activations, 256 images, one run, before
          rounding went layer by layer: divergence from the float network on 744 test images 0.636 compensated, 0.610
          tuned (46.8 and 46.1 % of the float answers kept). On ResNet-20 at W3A3 it was taken back or changed nothing.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitscape.calling import Inputs
from bitscape.data.samples import Minibatch, Samples
from bitscape.engine import Batch, BatchLoss, Cosine, StepRecord, train
from bitscape.engine.following import FollowFloat
from bitscape.engine.task import Task
from bitscape.engine.user_task import User
from bitscape.errors import at_least_one
from bitscape.models.layers import quantizable_layers
from bitscape.models.prepare import as_prepared
from bitscape.quant.layers import quantized_layers
from bitscape.tuning.guard import Guard
from bitscape.tuning.learning import EXAMPLE, Shuffled, relative_error
from bitscape.tuning.relaxed import Reach, relaxed

REACH = Reach(scales=0.5, codes=1.0)
LAYERS = 3.0
"""Weight of the layers' errors beside the divergence of the outputs."""


def tune(
    model: nn.Module,
    float_model: nn.Module,
    samples: Samples,
    held_out: Samples,
    task: Task,
    *,
    epochs: int = 8,
    batch_size: int = 16,
    reach: Reach = REACH,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Train a quantized and repaired `model` in place to follow `float_model`; return it.

    Args:
        model: what `repair` returned, by LSQ or LSQ+.
        float_model: the network that was quantized, norms folded.
        samples: inputs that are learned from; targets are not used.
        held_out: other inputs, which decide whether the result is kept; none that rounding saw.
        task: what the outputs mean.
        epochs: passes over the samples, at least 1.
        batch_size: samples a step.
        reach: how far codes and scales may come.
        seed: of the order of the samples.
        folder: where the checkpoint is kept; the same call goes on from there. None: nowhere.

    Raises:
        CheckpointError: the folder is of another run.
        BitscapeError: a quantizer other than LSQ's, outputs that are not the task's, or an argument out of range.
    """
    at_least_one(epochs=epochs, batch_size=batch_size)
    float_model = as_prepared(float_model)
    guard = Guard(model, float_model, held_out, task)
    loss = FollowLayers(FollowFloat(float_model, task), model)
    example = samples.first(EXAMPLE).parts[0].inputs
    inputs = Samples(Minibatch(part.inputs) for part in samples.parts)
    batches = Shuffled(inputs, batch_size, seed)
    with relaxed(model, example) as relaxation, loss.watching():
        train(
            model,
            batches,
            step=learn,
            optimizer=relaxation.optimizer(model, reach, epochs * len(batches)),
            schedule=Cosine(),
            epochs=epochs,
            task=User(name=task.name),
            loss=loss,
            folder=None if folder is None else Path(folder) / "tune",
            start=float_model,
            seed=seed,
        )
    guard.decide("tuning")
    return model.eval()


def learn(model: nn.Module, batch: Batch) -> StepRecord:
    """A step on the network as it is deployed: norms and dropout in eval mode."""
    model.eval()
    return batch.backward(model)


class FollowLayers:
    """The divergence of the outputs, and the mean over layers of their outputs' relative squared errors."""

    def __init__(self, outputs: FollowFloat, model: nn.Module) -> None:
        self.outputs = outputs
        layers, partners = quantized_layers(model), quantizable_layers(outputs.teacher)
        self._seen = LayerOutputs(layers)
        self._expected = LayerOutputs({name: partners[name] for name in layers})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the layers' outputs are seen."""
        with self._seen.watched(), self._expected.watched():
            yield

    def for_batch(self, inputs: Inputs) -> BatchLoss:
        """Run the float network once on `inputs`."""
        of_outputs = self.outputs.for_batch(inputs)
        expected = self._expected.taken()

        def loss(outputs: Any, targets: Any) -> Tensor:
            seen = self._seen.taken()
            errors = [relative_error(seen[name], expected[name]) for name in seen]
            return of_outputs(outputs, targets) + LAYERS * torch.stack(errors).mean()

        return loss


class LayerOutputs:
    """What layers returned since it was last asked."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._outputs: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block outputs are kept; of several calls of a layer the last one's."""
        handles = [
            layer.register_forward_hook(partial(self._see, name))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def taken(self) -> dict[str, Tensor]:
        """Return the outputs by layer, and let go of them."""
        outputs, self._outputs = self._outputs, {}
        return outputs

    def _see(self, name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self._outputs[name] = output
