"""The few samples of the user's data that a search, a calibration or an export looks at."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bitscape.data.reading import BatchReader, read_samples
from bitscape.data.samples import Samples
from bitscape.engine.forward import device_of
from bitscape.errors import BitscapeError


def proxy_of(
    model: nn.Module,
    data: Any,
    *,
    count: int,
    inputs: Callable[[Any], Any] | None,
    targets: Callable[[Any], Any] | None = None,
    seed: int,
) -> Samples:
    """Return up to `count` samples of `data`, on the model's device.

    Raises BitscapeError for data that cannot be read.
    """
    return read_samples(data, BatchReader.of(model, inputs, targets), count=count, seed=seed).to(device_of(model))


def one_tensor(samples: Samples) -> tuple[Tensor, Tensor | None]:
    """Return the samples of a network of one input as one tensor, and their targets.

    Raises BitscapeError for inputs that are no single tensor, and for inputs of several sizes.
    """
    part, *others = samples.parts
    if isinstance(part.inputs, dict) and len(part.inputs) == 1:  # a network's only argument, by its name
        (only,) = part.inputs.values()
    else:
        only = part.inputs
    if not isinstance(only, Tensor):
        raise BitscapeError(
            f"data: the network is called with a {type(only).__name__} of several inputs; a network of one input tensor is needed: "
            "give the others a default in its forward, or pass inputs=, a function from a batch to the one tensor"
        )
    if others:
        raise BitscapeError(
            f"data: samples of shapes {tuple(only.shape[1:])} and others; resize or crop them to one size"
        )
    return only, part.targets if isinstance(part.targets, Tensor) else None
