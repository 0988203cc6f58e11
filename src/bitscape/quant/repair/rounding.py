"""Compensated rounding: each weight's rounding error is made good by the weights of the same output that are still to be rounded.

Paper     Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", ICLR 2023, arXiv 2210.17323
Idea      A layer's squared output error is (w - q) H (w - q)^T with H the mean of x x^T over its inputs. Rounding column by
          column, each next target is moved so that it cancels what the errors so far do to the output.
Computes  Algorithm 1 -> compensated_codes. With H = R R^T, R upper triangular, the target of column j is
          w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj: the update by the Cholesky factor of the inverse, without the inverse.
Departs   Columns in order of decreasing diagonal of H (the authors' code: `act_order`); groups of a
          convolution in one batch; also per-tensor scales and mid-rise grids. Our own choices: H of
          n samples is shrunk towards its diagonal, by s / (s + 1) with s = k / n or 10 k / n. Of
          both, and of nearest rounding, each layer takes the one whose codes from half of the data
          do best on the other half. `repair` rounds in the order of the layers, all images side by
          side in the float and the quantized network (`in_order.py`): H is that of the inputs which
          the quantized layers before really give; the weight to approach is the least-squares
          solution from these inputs to the float outputs, with a ridge of k / n; and scales are
          fitted to the codes by output error.
Costs     k^3 / 3 for the factor and rows * k^2 for the columns of a layer with k weights a row, six
          times; one pass of the images through both networks. All maps of one layer, of as many
          images as fit into 256 MB, and a thread for every eight images in either network.
Measured  Top-1 of uniform weights (first layer 8 bits) and activations after repair, 256 images to
          repair, others to test (744 of an ImageNet sample, 2,000 of CIFAR-10), one run; before:
          rounding of every layer by itself, then output correction. MobileNetV1 0.25 W4A8 32.0 ->
          35.9 % and W3A8 14.0 -> 26.8 % (float 39.8 %), divergence from the float outputs 0.59 ->
          0.29 and 1.95 -> 0.96; MobileNetV2 W4A8 83.5 -> 85.0 % (float 88.3 %), 0.20 -> 0.13, with
          twice the positions and maps; SqueezeNet 1.1 W4A8 64.7 -> 63.3 % (float 65.2 %), 0.085 ->
          0.069; ResNet-20 W3A3 88.7 -> 88.8 % (float 91.6 %), 0.20 -> 0.19, with twice the
          positions and maps. Differences of top-1 below 2 points are within the noise.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitscape.errors import BitscapeError, nearest
from bitscape.models.layers import has_weight, outputs_first, quantizable_layers
from bitscape.quant.functional import power_of_two, without_autocast
from bitscape.quant.grid import Grid
from bitscape.quant.layers import QuantizedLayer, has_channel_scales, quantized_layers
from bitscape.quant.quantizers.lsq import LsqWeight
from bitscape.quant.reference import dequantize, quantize
from bitscape.quant.repair.moments import InputMoments

_log = logging.getLogger("bitscape.quant.repair")


SCALE_LIMIT = 2.0
"""A fitted scale stays within 1/2 .. 2 of the scale of the weights."""
SHRINKAGES = (1.0, 10.0)
"""Weights k of k / samples that are tried, in H shrunk towards its diagonal."""


@dataclass(frozen=True)
class RoundingError:
    """Squared output error of one layer from its weights, relative to its squared output.

    On the images of the moments.
    """

    nearest: float
    """Of rounding every weight to the nearest code."""
    repaired: float
    """Of the codes that were chosen."""


@torch.no_grad()
@without_autocast()
def compensate_rounding(
    model: nn.Module,
    moments: Mapping[str, InputMoments],
    *,
    activation_order: bool = True,
    damping: float = 0.01,
    block: int = 64,
) -> dict[str, RoundingError]:
    """Choose the codes of every weight so that errors cancel in the layer's output, and write them.

    Afterwards `layer.weight_quantizer(layer.weight)` equals `layer.weight`. Scales and activations
    stay as they are. `repair` also makes good what the layers before a layer do to its input.

    Args:
        model: quantized by LSQ or LSQ+; changed in place.
        moments: `input_moments` of the float network; layers without moments keep nearest rounding.
        activation_order: round the columns with the largest inputs first.
        damping: share of the mean diagonal that is added to the diagonal of H.
        block: columns rounded between two matrix products.

    Returns:
        Layer name -> squared output errors before and after.

    Raises:
        BitscapeError: no quantized layer, a weight quantizer that is not LSQ's, or moments of
            another network.
    """
    methods = compensations(activation_order=activation_order, damping=damping, block=block)
    tasks = rounding_tasks(model, moments)
    errors = {name: make().round(methods) for name, make in tasks.items()}
    log_errors("compensated rounding", errors)
    return errors


def compensations(
    *, activation_order: bool = True, damping: float = 0.01, block: int = 64
) -> list["Rounding"]:
    """Compensated rounding with less and less trust in H, at last none: nearest rounding."""
    if damping <= 0 or block < 1:
        raise BitscapeError(
            f"damping = {damping}, block = {block}: damping is above 0 (0.01 is usual), "
            "block at least 1"
        )

    def compensated(shrinkage: float) -> Rounding:
        return lambda task: _ordered_codes(task.shrunk(shrinkage), activation_order, damping, block)

    return [*map(compensated, SHRINKAGES), RoundingTask.nearest]


Part: TypeAlias = tuple[Float[Tensor, "g k k"], int]
"""Moments of a part of the data, and how many inputs they average."""


@dataclass(frozen=True)
class RoundingTask:
    """One layer's weight as rows of each group, with its grid; g groups, r rows, k weights a row."""

    layer: QuantizedLayer
    weight: Float[Tensor, "g r k"]
    """What codes shall act like."""
    scale: Float[Tensor, "g r k"]
    grid: Grid
    moments: Float[Tensor, "g k k"]
    """In units of their size."""
    samples: int
    """Inputs that the moments average."""
    parts: tuple[Part, ...]
    """Of which the moments are the mean."""
    unit: Tensor
    """Size of the weights."""

    def on(self, part: Part) -> "RoundingTask":
        """The same, known from a part of the data."""
        return replace(self, moments=part[0], samples=part[1], parts=(part,))

    def shrunk(self, shrinkage: float) -> "RoundingTask":
        """The same with moments shrunk towards their diagonal."""
        return replace(self, moments=shrunk(self.moments, self.samples, shrinkage))

    def nearest(self) -> Tensor:
        """Codes of nearest rounding."""
        return quantize(self.weight, self.scale, self.grid)

    def held(self, codes: Tensor) -> Tensor:
        """Codes clipped to the grid's limits."""
        return codes.clamp(float(self.grid.qmin), float(self.grid.qmax))

    def output_error(self, difference: Float[Tensor, "g r k"]) -> Tensor:
        """Squared output error of weights that differ by `difference`, of one row each: (g, r).

        In units of weights and moments.
        """
        difference = difference / self.unit
        return ((difference @ self.moments) * difference).sum(2)

    def error(self, codes: Float[Tensor, "g r k"]) -> Tensor:
        """Squared output error of `codes`, relative to the squared output."""
        total = self.output_error(self.weight).sum().clamp(min=1e-20)
        return self.output_error(self.real(codes) - self.weight).sum() / total

    def fitted(self, codes: Float[Tensor, "g r k"]) -> "RoundingTask":
        """The same with the scale of each row that gives `codes` the least output error."""
        levels = codes - self.grid.zero_point
        products = levels @ self.moments
        power = (products * levels).sum(2, keepdim=True)
        fit = (products * self.weight).sum(2, keepdim=True) / power
        scale = torch.where(power > 0, fit, self.scale)
        return replace(self, scale=scale.clamp(self.scale / SCALE_LIMIT, self.scale * SCALE_LIMIT))

    def best(self, methods: Sequence["Rounding"]) -> "Rounding":
        """The method whose codes from one part of the data are best on the other part.

        The first one where there is one part only.
        """
        if len(self.parts) < 2:
            return methods[0]
        seen, unseen = (self.on(part) for part in self.parts[:2])
        errors = [float(unseen.error(method(seen))) for method in methods]
        return methods[errors.index(min(errors))]

    def round(self, methods: Sequence["Rounding"]) -> RoundingError:
        """Write codes by the best of the methods into the layer; say what that gained."""
        return self.write(self.best(methods)(self))

    def write(self, codes: Float[Tensor, "g r k"]) -> RoundingError:
        """Put the grid values of `codes` into the layer's weight, and say what that gained."""
        quantizer = cast(LsqWeight, self.layer.weight_quantizer)
        before = quantizer(self.layer.weight).detach()
        error = self.output_error(self._rows(before) - self.weight).sum()
        total = self.output_error(self.weight).sum().clamp(min=1e-20)
        result = RoundingError(float(error / total), float(self.error(codes)))
        if has_channel_scales(self.layer):
            quantizer.scale.copy_(self.scale[:, :, 0].reshape(quantizer.scale.shape))
        rows = self.real(codes).reshape(outputs_first(self.layer, self.layer.weight).shape)
        self.layer.weight.copy_(outputs_first(self.layer, rows))
        return result

    def _rows(self, weight: Tensor) -> Float[Tensor, "g r k"]:
        return outputs_first(self.layer, weight).float().reshape(self.weight.shape)

    def real(self, codes: Tensor) -> Tensor:
        """Real values of codes."""
        return dequantize(codes, self.scale, self.grid.zero_point)


Rounding: TypeAlias = Callable[[RoundingTask], Tensor]
"""From a task to its codes (g, r, k)."""


def shrunk(
    moments: Float[Tensor, "g k k"], samples: int, shrinkage: float
) -> Float[Tensor, "g k k"]:
    """Moments whose share s / (s + 1), s = shrinkage * k / samples, is their diagonal alone.

    Of fewer samples than weights a row, H says more about the samples than about the inputs.
    """
    ratio = shrinkage * moments.shape[1] / samples
    diagonal = torch.diag_embed(moments.diagonal(dim1=1, dim2=2))
    return torch.lerp(moments, diagonal, ratio / (ratio + 1))


def rounding_tasks(
    model: nn.Module, moments: Mapping[str, InputMoments]
) -> dict[str, Callable[[], RoundingTask]]:
    """What makes the task of each quantized layer that has moments.

    Raises what `compensate_rounding` says.
    """
    layers = roundable_layers(model)
    known = quantizable_layers(model)  # those that stay float need no repair
    unknown = [name for name in moments if name not in known]
    if unknown:
        raise BitscapeError(
            f"moments: no quantized layer {unknown[0]!r}{nearest(unknown[0], layers)}; "
            "collect them from the float network that was quantized"
        )
    chosen = {name: layer for name, layer in layers.items() if name in moments}
    for name, layer in chosen.items():
        groups, k = moments[name].parts[0].shape[:2]
        weight = outputs_first(layer, layer.weight)
        if weight[0].numel() != k or weight.shape[0] % groups:
            raise BitscapeError(
                f"moments: layer {name} has weights of {tuple(layer.weight.shape)}, "
                f"its moments {tuple(moments[name].parts[0].shape)}"
            )
    return {name: partial(task_of, layer, moments[name]) for name, layer in chosen.items()}


def roundable_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Name -> quantized layer with a weight; raises what `compensate_rounding` says."""
    layers = {name: one for name, one in quantized_layers(model).items() if has_weight(one)}
    if not layers:
        raise BitscapeError(
            "model: it has no quantized layer; call bitscape.quantize(model, policy, data) first"
        )
    for name, layer in layers.items():
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, LsqWeight) or isinstance(quantizer.bits, Tensor):
            raise BitscapeError(
                f"layer {name}: its weight quantizer is {type(quantizer).__name__}, whose grid "
                "moves with the weights or holds several widths; rounding can be repaired for Lsq "
                "and LsqPlus with one width a layer"
            )
    return layers


def task_of(layer: QuantizedLayer, given: InputMoments) -> RoundingTask:
    """The task of a layer whose inputs have the `given` moments."""
    quantizer, weight = cast(LsqWeight, layer.weight_quantizer), layer.weight.detach()
    scale = quantizer.grid_scale(weight).detach().expand_as(weight)
    groups, k = given.parts[0].shape[:2]
    scale, weight = (
        outputs_first(layer, values).float().reshape(groups, -1, k) for values in (scale, weight)
    )
    parts = [part.to(weight.device) for part in given.parts]
    moments = given.mean.to(weight.device)
    # Squares of small weights and inputs are zero in float32.
    size = power_of_two(moments.diagonal(dim1=1, dim2=2).mean())
    return RoundingTask(
        layer=layer,
        weight=weight,
        scale=scale,
        grid=quantizer.grid,
        moments=moments / size,
        samples=sum(given.samples),
        parts=tuple((p / size, n) for p, n in zip(parts, given.samples, strict=True)),
        unit=power_of_two(weight.abs().max()),
    )


def _ordered_codes(task: RoundingTask, activation_order: bool, damping: float, block: int) -> Tensor:
    diagonal = task.moments.diagonal(dim1=1, dim2=2)
    if activation_order:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
    else:
        order = torch.arange(diagonal.shape[1], device=diagonal.device).expand_as(diagonal)
    columns = order[:, None, :].expand_as(task.weight)
    moments = task.moments.gather(1, order[:, :, None].expand_as(task.moments))
    moments = moments.gather(2, order[:, None, :].expand_as(moments))
    influence = _influence(moments, damping)
    codes = compensated_codes(task.weight.gather(2, columns), task.scale.gather(2, columns), task.grid, influence, block)
    return torch.empty_like(codes).scatter_(2, columns, codes)


def _influence(moments: Float[Tensor, "g k k"], damping: float) -> Float[Tensor, "g k k"]:
    """R_ij / R_jj above the diagonal, else 0, where R R^T is the damped H and R is upper triangular."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    scaled = moments / mean.clamp(min=1e-20)
    identity = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
    # An upper factor in this order of R R^T is a lower factor with rows and columns reversed.
    reversed_factor, failures = torch.linalg.cholesky_ex((scaled + damping * identity).flip(1, 2))
    while failures.any():
        damping *= 10
        reversed_factor, failures = torch.linalg.cholesky_ex((scaled + damping * identity).flip(1, 2))
    factor = reversed_factor.flip(1, 2)
    return torch.triu(factor / factor.diagonal(dim1=1, dim2=2)[:, None, :], diagonal=1)


def compensated_codes(
    weight: Float[Tensor, "g r k"],
    scale: Float[Tensor, "g r k"],
    grid: Grid,
    influence: Float[Tensor, "g k k"],
    block: int,
) -> Float[Tensor, "g r k"]:
    """Codes of the columns of `weight`, rounded from first to last, each target moved by the errors before it times `influence`."""
    # Columns first: a column is then one stretch of memory.
    weight, scale = weight.permute(2, 0, 1).contiguous(), scale.permute(2, 0, 1).contiguous()
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    columns = weight.shape[0]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        moved = torch.einsum("igr,gij->jgr", errors[:start], influence[:, :start, start:stop])
        targets = weight[start:stop] + moved
        for j in range(start, stop):
            target = targets[j - start]
            codes[j] = quantize(target, scale[j], grid)
            errors[j] = weight[j] - dequantize(codes[j], scale[j], grid.zero_point)
            if j + 1 < stop:
                targets[j + 1 - start] += torch.einsum("igr,gi->gr", errors[start : j + 1], influence[:, start : j + 1, j + 1])
    return codes.permute(1, 2, 0)


def log_errors(what: str, errors: Mapping[str, RoundingError]) -> None:
    """Log how far the sum of relative errors fell."""
    before, after = (sum(getattr(e, field) for e in errors.values()) for field in ("nearest", "repaired"))
    _log.info("%s of %d layers: relative output error %.3g -> %.3g in sum", what, len(errors), before, after)
