"""The parts of a network that can be trained one after the other, each by its own input and output."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitscape.calling import Inputs, call
from bitscape.errors import explained_forward
from bitscape.models.modes import evaluating
from bitscape.quant.layers import quantized_layers

MOST_LAYERS = 8
"""Quantized layers of a block: those of a transformer's encoder block, products included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A module that runs once, from one tensor to another."""

    name: str
    module: nn.Module
    follows: bool
    """Whether it takes, unchanged, what the block before it returned."""
    sample_bytes: int
    """Of what it takes and returns for one sample."""


def find_blocks(model: nn.Module, example: Inputs) -> list[Block]:
    """Return the blocks of a quantized network in the order of their calls; a layer is in one at most.

    A block is the outermost module of at most MOST_LAYERS quantized layers that runs once, from one tensor (n, ...) to
    one tensor (n, ...). A sequence with a block of several layers in it is no block, but what it holds. Layers that no
    block holds, since they run twice or take several tensors, keep what rounding gave them.

    Args:
        model: quantized and calibrated.
        example: inputs of at least one sample.
    """
    calls = _Calls()
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(calls.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(calls.leave))
    try:
        with evaluating(model), explained_forward(example):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    found = dict(_outermost("", model, calls.records))
    modules = sorted(found, key=lambda module: calls.records[module].order)
    returned = [None, *(calls.records[module].returned for module in modules)]
    return [
        Block(
            name=found[module],
            module=module,
            follows=calls.records[module].taken == before,
            sample_bytes=calls.records[module].sample_bytes,
        )
        for module, before in zip(modules, returned, strict=False)
    ]


@dataclass
class _Record:
    """What a pass shows of a module."""

    order: int
    calls: int = 0
    taken: tuple[int, int] | None = None
    """The tensor that it takes, and how often that was changed in place; None for anything else."""
    returned: tuple[int, int] | None = None
    """The same of what it returns."""
    sample_bytes: int = 0
    """Of both."""

    @property
    def is_simple(self) -> bool:
        return self.calls == 1 and self.taken is not None and self.returned is not None


@dataclass
class _Calls:
    records: dict[nn.Module, _Record] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)
    """So that no id is given twice."""

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        record = self.records.setdefault(module, _Record(len(self.records)))
        record.calls += 1
        record.taken = self._mark(record, inputs[0]) if len(inputs) == 1 and not named else None

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        record = self.records[module]
        record.returned = self._mark(record, output)

    def _mark(self, record: _Record, value: Any) -> tuple[int, int] | None:
        self._alive.append(value)
        if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
            return None
        record.sample_bytes += value.nbytes // max(1, len(value))
        return id(value), value._version


def _outermost(
    name: str, module: nn.Module, records: Mapping[nn.Module, _Record]
) -> Iterator[tuple[nn.Module, str]]:
    if _is_block(module, records):
        yield module, name
        return
    for part, child in module.named_children():
        yield from _outermost(f"{name}.{part}" if name else part, child, records)


def _is_block(module: nn.Module, records: Mapping[nn.Module, _Record]) -> bool:
    layers, record = quantized_layers(module).values(), records.get(module)  # a ModuleList never runs itself
    return (
        record is not None
        and record.is_simple
        and 0 < len(layers) <= MOST_LAYERS
        and all(layer in records and records[layer].calls == 1 for layer in layers)
        and not (isinstance(module, nn.Sequential) and any(len(quantized_layers(one)) > 1 for one in module))
    )
