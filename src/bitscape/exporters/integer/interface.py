"""What graphs and files take and return: tensors by name, whatever a network is called with.

    an argument that is a tensor          its name in the network's forward: pixels
    tensors within an argument            joined by dots: pair.0, state.hidden
    the tensors of *args and **keywords   args.0, args.1; the keywords' own names
    an input of an output's name          with ".input" behind it

Outputs are named as `named_outputs` does. What is no tensor, such as a number or a flag, is the same in every call.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitscape.calling import Inputs, arguments_of, call, first_rows, map_tensors, moved, sample_count
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_inputs
from bitscape.models.modes import evaluating
from bitscape.models.named_outputs import joined_name, named_outputs, returning_by_name
from bitscape.nested import tensors_by_path

TRACED = 2
"""Samples that are traced: with one, the batch size would not stay free."""


@dataclass(frozen=True, kw_only=True)
class GraphInput:
    """One tensor that a graph takes."""

    name: str
    """In graphs and files."""
    key: str
    """The same without what tells it from an output."""
    batched: bool
    """Whether its first dimension is that of the samples; otherwise its shape is fixed."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The inputs and outputs of one network."""

    signature: inspect.Signature
    """Of its forward."""
    inputs: tuple[GraphInput, ...]
    """In the order of the forward's arguments."""
    outputs: tuple[str, ...]
    """In the order in which it returns them."""
    constants: str
    """The arguments without their tensors, written out: a graph holds them as they were."""

    @classmethod
    def of(cls, network: nn.Module, samples: Samples) -> "Interface":
        """Run two samples to see what the network takes and returns.

        A tensor has a batch dimension where its first size is the number of samples.

        Raises BitscapeError for a forward that fails.
        """
        inputs = samples.parts[0].inputs
        count, example = sample_count(inputs), example_of(samples, network)
        with explained_forward(example), evaluating(network):
            outputs = tuple(named_outputs(call(network, example)))
        signature = inspect.signature(network.forward)
        bound = _bound(signature, inputs)
        return cls(
            signature=signature,
            inputs=tuple(
                GraphInput(
                    name=f"{key}.input" if key in outputs else key,
                    key=key,
                    batched=bool(tensor.ndim) and len(tensor) == count,
                )
                for key, tensor in _by_key(bound).items()
            ),
            outputs=outputs,
            constants=_constants(bound),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(entry.name for entry in self.inputs)

    def tensors(self, inputs: Inputs) -> list[Tensor]:
        """What the network is called with as the tensors that the graph takes, in order.

        Raises BitscapeError for other inputs than those that were traced.
        """
        bound = _bound(self.signature, inputs)
        tensors, keys = _by_key(bound), [entry.key for entry in self.inputs]
        if tensors.keys() != set(keys):
            raise BitscapeError(f"inputs: {', '.join(tensors) or 'no tensor'}; the network was traced with {', '.join(keys)}")
        if (constants := _constants(bound)) != self.constants:
            raise BitscapeError(
                f"inputs: the arguments are {constants} beside the tensors, and {self.constants} when the network was traced; "
                "a file holds them as they were: pass as tensors what changes"
            )
        return [tensors[key] for key in keys]

    def feeds(self, data: Samples | Inputs, batch_size: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the inputs in batches as a file takes them: arrays by name."""
        for batch in as_samples(data).batches(batch_size):
            yield self.feed(batch.inputs)

    def feed(self, inputs: Inputs) -> dict[str, NDArray[Any]]:
        """The inputs of one call as a file takes them: arrays by name."""
        return dict(zip(self.names, (tensor.cpu().numpy() for tensor in self.tensors(inputs)), strict=True))

    def free_batch(self) -> tuple[dict[int, Any] | None, ...]:
        """Which dimension of each input is free, for torch.export."""
        batch = torch.export.Dim("batch")
        return tuple({0: batch} if entry.batched else None for entry in self.inputs)

    @contextmanager
    def called_flat(self, network: nn.Module, example: Inputs) -> Iterator[None]:
        """Within the block the network takes the graph's tensors, one argument each, and returns outputs by name."""
        with returning_by_name(network):
            by_name = network.forward

            def forward(*tensors: Tensor) -> Any:
                values, bound = iter(tensors), _bound(self.signature, example)
                for name, value in bound.arguments.items():
                    bound.arguments[name] = map_tensors(lambda _: next(values), value)
                return by_name(*bound.args, **bound.kwargs)

            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # torch.export names arguments by it
                [inspect.Parameter(name, kind) for name in _identifiers(self.names)]
            )
            network.forward = forward
            try:
                yield
            finally:
                network.forward = by_name


def as_samples(data: Samples | Inputs) -> Samples:
    """Return samples; other inputs are one batch of them."""
    return data if isinstance(data, Samples) else Samples.of(data)


def checked_samples(data: Samples | Inputs, network: nn.Module) -> Samples:
    """Return samples that `network` can be traced with.

    Raises:
        BitscapeError: inputs of other types, one sample alone, or samples of several shapes.
    """
    check_inputs(data.parts[0].inputs if isinstance(data, Samples) else data, "example", model=network)
    samples = as_samples(data)
    check_one_shape(samples)
    if (count := len(samples.parts[0])) < TRACED:
        raise BitscapeError(f"example: {count} images; give two at least, so that the batch size stays free")
    return samples


def check_one_shape(*data: Samples) -> None:
    """Raise BitscapeError for samples of several shapes: a file takes one, in batches of any size."""
    parts = [part for samples in data for part in samples.parts]
    shapes = dict.fromkeys(tuple(map(tuple, Samples([part]).shapes)) for part in parts)
    if len(shapes) > 1:
        first, second, *_ = (" and ".join(map(str, shape)) for shape in shapes)
        raise BitscapeError(f"data: samples of shapes {first} and others of {second}; a file takes one: resize or crop them to one size")


def example_of(samples: Samples, network: nn.Module, count: int = TRACED) -> Inputs:
    """The first samples, on the network's device."""
    inputs = first_rows(samples.parts[0].inputs, count)
    device = next((parameter.device for parameter in network.parameters()), None)
    return inputs if device is None else moved(inputs, device)


def _bound(signature: inspect.Signature, inputs: Inputs) -> inspect.BoundArguments:
    """Which argument of a forward gets what, in the order of the signature."""
    arguments, keywords = arguments_of(inputs)
    try:
        return signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise BitscapeError(
            f"inputs: they do not fit the network's forward{signature} ({error}); give a tuple of its arguments, or a mapping of keywords"
        ) from error


def _by_key(bound: inspect.BoundArguments) -> dict[str, Tensor]:
    """The tensors among the arguments by name, in order."""
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    tensors: dict[str, Tensor] = {}
    for path, tensor in tensors_by_path(bound.arguments):
        first, *rest = path
        key = joined_name(rest if rest and kinds[str(first)] is inspect.Parameter.VAR_KEYWORD else path)
        if key in tensors:
            raise BitscapeError(f"network: two of its inputs are called {key!r}; rename one")
        tensors[key] = tensor
    return tensors


def _constants(bound: inspect.BoundArguments) -> str:
    """What the arguments hold beside tensors; what is left out is at its default."""
    parameters = bound.signature.parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
    return repr(map_tensors(lambda _: Ellipsis, defaults | bound.arguments))  # type: ignore[arg-type,return-value]  # to be read


def _identifiers(names: tuple[str, ...]) -> list[str]:
    """Names that may stand in a signature, each once."""
    identifiers: list[str] = []
    for name in names:
        identifier = re.sub(r"\W", "_", f"input_{name}" if name[:1].isdigit() else name)
        while identifier in identifiers:
            identifier += "_"
        identifiers.append(identifier)
    return identifiers
