"""Second moments of every layer's input: collected once from the float network, used for every policy."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bitscape.calling import Inputs
from bitscape.errors import BitscapeError
from bitscape.models.layers import weighted_layers
from bitscape.models.modes import evaluating
from bitscape.models.prepare import as_prepared
from bitscape.quant.convert import Data, batches_of, run_batches
from bitscape.quant.functional import without_autocast

_log = logging.getLogger("bitscape.quant.repair")
BATCH = 8
"""Images at once: their maps stay in the cache, and there are batches for both parts."""
UNFOLDED_ELEMENTS = 1 << 24
"""Values unfolded at once: 64 MB of float32."""


@dataclass(frozen=True)
class InputMoments:
    """Mean of x x^T over the inputs x of one layer, in two parts: what one suggests, the other judges."""

    parts: tuple[Float[Tensor, "groups k k"], ...]
    """Of every second batch each; a single one where the layer ran in one batch only."""
    samples: tuple[int, ...]
    """Inputs x that each part averages."""

    @property
    def mean(self) -> Float[Tensor, "groups k k"]:
        """The mean over both parts."""
        shares = [count / sum(self.samples) for count in self.samples]
        return torch.stack([p * share for p, share in zip(self.parts, shares, strict=True)]).sum(0)


def input_moments(
    model: nn.Module, data: Data, *, positions: int = 128, seed: int = 0
) -> dict[str, InputMoments]:
    """Mean of x x^T over the inputs x that a layer's weight rows are multiplied with.

    Every convolution, transposed or not, and every product with a layer's own weight counts, so
    padding of the layer's own (SAME) and shared layers are right. A layer that computes another
    weight first (weight standardisation) is left out, as are layers that never run.

    Args:
        model: float network; nn.MultiheadAttention is split in a copy, as `quantize` does.
        data: samples, a tensor (n, ...), or batches of inputs; normalized.
        positions: output positions (or tokens) of each image that count, drawn at random; a few
            thousand in all are enough for most layers.
        seed: of that draw.

    Returns:
        Layer name -> moments, with k = inputs of a group times the kernel's size. They take twice
        the memory of the sum of all k^2.

    Raises:
        BitscapeError: no images, or inputs that are not finite (the layer is named).
    """
    model = as_prepared(model)
    names = {layer.get_parameter("weight"): name for name, layer in weighted_layers(model).items()}
    sums = _Sums(names, positions, torch.Generator().manual_seed(seed))
    with evaluating(model), sums:
        if not run_batches(model, sums.in_parts(batches_of(data, model, batch_size=BATCH))):
            raise BitscapeError("images: no batch; give at least one image, better a few hundred")
    moments = sums.moments()
    for name in names.values() - moments.keys():
        _log.warning("layer %s: no moments, it never ran, or not with its own weight", name)
    return moments


class LayerInputs(TorchFunctionMode):
    """Sees the inputs of every product with a known weight, as rows, before it is computed."""

    def __init__(
        self, names: Mapping[Tensor, str], positions: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.names, self.positions, self.generator = dict(names), positions, generator

    def before(self, name: str, rows: Iterator[Float[Tensor, "groups k n"]]) -> Tensor | None:
        """Take the inputs of layer `name`; return the weight to compute with, None for its own."""
        raise NotImplementedError

    def after(self, name: str, output: Tensor) -> Tensor:
        """Take what the layer computed; return what it shall have computed."""
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows_of, kwargs = _ROWS.get(func), dict(kwargs or {})
        if rows_of is None:
            return func(*args, **kwargs)
        name = self.names.get(kwargs["weight"] if "weight" in kwargs else args[1])
        if name is None:
            return func(*args, **kwargs)
        weight = self.before(name, rows_of(self, *args, **kwargs))
        if weight is not None and "weight" in kwargs:
            kwargs["weight"] = weight
        elif weight is not None:
            args = (args[0], weight, *args[2:])
        return self.after(name, func(*args, **kwargs))

    def linear_rows(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
        """Inputs of a linear layer, in one piece."""
        tokens = input.reshape(len(input), -1, input.shape[-1]) if input.ndim > 1 else input[None, None]
        taken = tokens[:, self._chosen(tokens.shape[1], tokens.device)]
        yield taken.reshape(1, -1, input.shape[-1]).mT.float()

    def conv_rows(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Iterator[Tensor]:
        """Unfolded inputs of a convolution, in pieces of bounded size; `torch.conv2d`'s arguments."""
        if input.ndim == weight.ndim - 1:
            input = input[None]
        size = weight.shape[2:]
        windows = _Windows(input.shape[2:], size, _each(stride, size), padding, _each(dilation, size))
        chosen = self._chosen(windows.count, input.device)
        places, inside = windows.places(chosen)
        per_image = len(chosen) * input.shape[1] * size.numel()
        for piece in input.flatten(2).split(max(1, UNFOLDED_ELEMENTS // per_image)):
            taken = piece.gather(2, places.expand(*piece.shape[:2], -1)).where(inside, 0).float()
            taken = taken.unflatten(2, (len(chosen), -1)).permute(1, 3, 0, 2)  # as in a weight: channels, then the kernel
            yield taken.reshape(groups, -1, len(piece) * len(chosen))

    def transposed_rows(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Iterator[Tensor]:
        """Those of a transposed convolution: a plain one, its kernel turned about, over an input with zeros in between."""
        if input.ndim == weight.ndim - 1:
            input = input[None]
        size = weight.shape[2:]
        stride, padding, output_padding, dilation = (_each(value, size) for value in (stride, padding, output_padding, dilation))
        reach = [d * (k - 1) - p for k, p, d in zip(size, padding, dilation, strict=True)]
        behind = [r + more for r, more in zip(reach, output_padding, strict=True)]
        spread = F.pad(_spread(input, stride), [amount for pair in zip(reversed(reach), reversed(behind), strict=True) for amount in pair])
        plain = weight.new_empty(0, input.shape[1] // groups, *size)
        for rows in self.conv_rows(spread, plain, dilation=dilation, groups=groups):
            yield rows.unflatten(1, (-1, size.numel())).flip(2).flatten(1, 2)

    def _chosen(self, count: int, device: torch.device) -> Tensor:
        """Which of `count` output positions count."""
        if count <= self.positions:
            return torch.arange(count, device=device)
        return torch.randperm(count, generator=self.generator)[: self.positions].to(device)


_ROWS: dict[Any, Callable[..., Iterator[Tensor]]] = {
    torch.conv1d: LayerInputs.conv_rows,
    torch.conv2d: LayerInputs.conv_rows,
    torch.conv3d: LayerInputs.conv_rows,
    torch.conv_transpose1d: LayerInputs.transposed_rows,
    torch.conv_transpose2d: LayerInputs.transposed_rows,
    torch.conv_transpose3d: LayerInputs.transposed_rows,
    F.linear: LayerInputs.linear_rows,
}


class _Sums(LayerInputs):
    """Sums of x x^T of every layer, batches in turn to the one part and to the other."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.part = 0
        self.sums: dict[str, dict[int, Tensor]] = {}
        self.counts: dict[str, dict[int, int]] = {}

    def in_parts(self, batches: Iterator[Inputs]) -> Iterator[Inputs]:
        """Yield the batches; each goes to the other part than the one before."""
        for inputs in batches:
            yield inputs
            self.part = 1 - self.part

    def before(self, name: str, rows: Iterator[Tensor]) -> None:
        sums, counts = self.sums.setdefault(name, {}), self.counts.setdefault(name, {})
        for piece in rows:
            with without_autocast():  # the network may compute in half precision in its forward
                moments = piece @ piece.mT
            if self.part in sums:
                sums[self.part] += moments
                counts[self.part] += piece.shape[2]
            else:
                sums[self.part], counts[self.part] = moments, piece.shape[2]

    def moments(self) -> dict[str, InputMoments]:
        """The means, layer by layer."""
        return {
            name: InputMoments(
                tuple(mean_of(name, total, self.counts[name][part]) for part, total in sums.items()),
                tuple(self.counts[name].values()),
            )
            for name, sums in self.sums.items()
        }


def mean_of(name: str, total: Tensor, count: int) -> Tensor:
    """The sum of x x^T over `count` inputs as their mean; it has to be finite."""
    if not torch.isfinite(total).all():
        raise BitscapeError(
            f"layer {name}: its inputs, or their squares in float32, are not finite; "
            "check the checkpoint and the normalization"
        )
    return total / count


def _spread(input: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`input` (n, c, *positions) with stride - 1 zeros between neighbours."""
    sizes = [(n - 1) * s + 1 for n, s in zip(input.shape[2:], stride, strict=True)]
    spread = input.new_zeros(*input.shape[:2], *sizes)
    places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    spread[places] = input
    return spread


class _Windows:
    """Where the windows of a convolution's outputs lie in its input."""

    def __init__(
        self, input_size: torch.Size, size: torch.Size, stride: tuple[int, ...], padding: Any, dilation: tuple[int, ...]
    ) -> None:
        before, behind = _paddings(padding, size, dilation)
        self.input_size, self.size, self.stride, self.before, self.dilation = input_size, size, stride, before, dilation
        reaches = [n + b + e - d * (k - 1) for n, b, e, d, k in zip(input_size, before, behind, dilation, size, strict=True)]
        self.outputs = torch.Size([(reach - 1) // s + 1 for reach, s in zip(reaches, stride, strict=True)])
        self.count = self.outputs.numel()

    def places(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Of the `chosen` output positions: where in the flat input each value of their windows lies, and whether it is no padding."""
        place = torch.zeros(len(chosen), *[1] * len(self.size), dtype=torch.long, device=chosen.device)
        inside = torch.ones_like(place, dtype=torch.bool)
        positions = torch.unravel_index(chosen, self.outputs)
        axes = zip(positions, self.input_size, self.size, self.stride, self.before, self.dilation, strict=True)
        for axis, (position, n, k, s, b, d) in enumerate(axes):
            along = position[:, None] * s - b + torch.arange(k, device=chosen.device) * d
            along = along.reshape(len(chosen), *[k if other == axis else 1 for other in range(len(self.size))])
            place = place * n + along.clamp(0, n - 1)
            inside = inside & (along >= 0) & (along < n)
        return place.flatten(), inside.flatten()


def _each(value: Any, size: Any) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(size) if len(values) == 1 else values


def _paddings(padding: Any, size: torch.Size, dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and behind the input, for each of its dimensions."""
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        return tuple(r // 2 for r in reach), tuple(r - r // 2 for r in reach)
    both = _each(0 if padding == "valid" else padding, size)
    return both, both
