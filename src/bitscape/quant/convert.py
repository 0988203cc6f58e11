"""A float network and a policy in, a quantized network out; calibration and norm statistics."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitscape.calling import Inputs, call, map_tensors, moved, sample_count
from bitscape.data.samples import Minibatch, Samples
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_float32, check_inputs
from bitscape.models.layers import has_weight, layer_shapes, quantizable_layers, scale_axis
from bitscape.models.modes import evaluating
from bitscape.models.prepare import check_layers, prepare
from bitscape.models.products import product_names
from bitscape.models.trial import check_weight_uses
from bitscape.nested import tensors_in
from bitscape.policy import Policy
from bitscape.quant.layers import quantized_class, quantized_layers, require_float, require_quantized
from bitscape.quant.observers import Mse, Observer
from bitscape.quant.quantizers import FakeQuantizer, Lsq, Quantizer
from bitscape.quant.samples import ValueSample

_log = logging.getLogger("bitscape.quant")
Data: TypeAlias = Samples | Tensor | Iterable[Inputs]
"""Samples, a tensor (n, ...), or batches of inputs."""
_DEFAULT_QUANTIZER = Lsq()
_DEFAULT_OBSERVER = Mse()


def with_quantizers(
    model: nn.Module,
    policy: Policy,
    quantizer: Quantizer = _DEFAULT_QUANTIZER,
    *,
    observer: Observer = _DEFAULT_OBSERVER,
    inplace: bool = False,
) -> nn.Module:
    """Return `model` with every layer of `policy` quantized; weight scales are set, activation scales wait for `calibrate`.

    Args:
        model: float network; it is copied unless `inplace`.
        policy: bits of every layer of `models.layers.QUANTIZABLE`; those of nn.MultiheadAttention are q_proj, k_proj, v_proj and out_proj.
            Where it names the products of attention ("attn.scores", "attn.values"), these are quantized too. Layers with
            `LayerBits.FLOAT` are left as they are.
        quantizer: how weights and activations are laid on their grids.
        observer: where weight scales start.

    Raises:
        PolicyError: unknown or missing layers, or a policy of another network.
        BitscapeError: a model that is quantized already, not float32, or that `models.prepare` refuses;
            weights that are not finite (the layer is named).
    """
    check_float32(model)
    require_float(model)
    if torch.is_inference_mode_enabled():
        raise BitscapeError(
            "torch.inference_mode is on, and a network made in it could not be used outside; "
            "quantize outside of it, or use torch.no_grad"
        )
    if not isinstance(policy, Policy):
        kind = type(policy).__name__
        raise BitscapeError(
            f"policy: {kind} is no Policy; read a file with Policy.load(path), or use bitscape.policy.uniform_policy(names, bits)"
        )
    check_layers(model)
    added = product_names(model)
    with_products = not policy.layers.keys().isdisjoint(added)
    # Before anything changes: a refused policy leaves the network as it is.
    policy.check(layer_shapes(model) | (dict.fromkeys(added, (0,)) if with_products else {}))
    model = prepare(model, inplace=inplace, attention_products=with_products)
    layers = {name: layer for name, layer in quantizable_layers(model).items() if not policy.layers[name].is_float}
    weighted = {name: layer for name, layer in layers.items() if has_weight(layer)}
    weight_quantizers = _weight_quantizers(weighted, policy, quantizer, observer)
    for name in layers.keys() - weight_quantizers.keys():  # products: the second operand is an activation, too
        weight_quantizers[name] = quantizer.for_activation(policy.layers[name].weight).to(_device(layers[name], model))
    for name, layer in layers.items():
        # In place, and by class: see layers.py.
        layer.__class__ = quantized_class(type(layer))
        layer.weight_quantizer = weight_quantizers[name]
        layer.input_quantizer = quantizer.for_activation(policy.layers[name].activation).to(_device(layer, model))
    return model


def _device(layer: nn.Module, model: nn.Module) -> torch.device:
    return next((p.device for p in chain(layer.parameters(), model.parameters())), torch.device("cpu"))


def _weight_quantizers(
    layers: Mapping[str, nn.Module], policy: Policy, quantizer: Quantizer, observer: Observer
) -> dict[str, FakeQuantizer]:
    """One for each layer, its scales set; layers that share a weight at the same bits share the quantizer, so that they stay alike."""
    made: dict[tuple[nn.Parameter, int, int], FakeQuantizer] = {}
    by_name = {}
    for name, layer in layers.items():
        weight, bits, axis = layer.get_parameter("weight"), policy.layers[name].weight, scale_axis(layer)
        if (weight, bits, axis) not in made:
            made[weight, bits, axis] = quantizer.for_weight(weight, bits, axis)
            with _naming(name, "weight"):
                made[weight, bits, axis].initialize(weight, observer)
        by_name[name] = made[weight, bits, axis].to(weight.device)
    return by_name


@contextmanager
def bypassed(model: nn.Module, *quantizers: str) -> Iterator[None]:
    """Within the block the named quantizers ("weight_quantizer", "input_quantizer"; default both) pass values through."""
    names = quantizers or ("weight_quantizer", "input_quantizer")
    saved = [(layer, name, getattr(layer, name)) for layer in quantized_layers(model).values() for name in names]
    try:
        for layer, name, _ in saved:
            setattr(layer, name, nn.Identity())
        yield
    finally:
        for layer, name, module in saved:
            setattr(layer, name, module)


def calibrate(model: nn.Module, data: Data, observer: Observer = _DEFAULT_OBSERVER) -> nn.Module:
    """Set the activation scales of a quantized `model` from `data`, in place; no labels are needed.

    Args:
        model: what `with_quantizers` returned.
        data: samples, a tensor (n, ...), or batches of inputs, gone through once; a few hundred samples are enough.
        observer: how a range is chosen from the values seen.

    Raises:
        BitscapeError: no quantized layer, a weight that is used outside of its layer too, or
            activations that are not finite (the layer is named).
    """
    layers = require_quantized(model)
    batches = batches_of(data, model)
    first = list(islice(batches, 1))
    for batch in first:
        with bypassed(model):
            check_weight_uses(model, batch)
    inputs = record_inputs(model, layers, chain(first, batches))
    for name, layer in layers.items():
        if name not in inputs:
            _log.warning("layer %s never ran during calibration: its activation scale is not set", name)
            continue
        with _naming(name, "input"):
            layer.input_quantizer.initialize(inputs[name], observer)  # type: ignore[operator]  # a FakeQuantizer
        if not has_weight(layer):
            with _naming(name, "second input"):
                layer.weight_quantizer.initialize(inputs[second_input(name)], observer)  # type: ignore[operator]  # as above
    return model


def second_input(product: str) -> str:
    """Under what name `record_inputs` returns the second operand of a product."""
    return f"{product}:2"


def operands_of(inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What a layer was called with, by position or by name, in the order of its forward's arguments."""
    names = ("input", "a", "b")
    return (*inputs, *(named[name] for name in names if name in named))


def record_inputs(model: nn.Module, layers: Mapping[str, nn.Module], data: Data) -> dict[str, Tensor]:
    """Run the network in float and return, for each of `layers` that ran, a 1-d sample of its input values with both extremes.

    Of products of two activations the second operand stands under `second_input`.
    """
    samples: defaultdict[str, ValueSample] = defaultdict(ValueSample)

    def hook_for(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
            operands = operands_of(inputs, named)
            samples[name].add(operands[0])
            if not has_weight(module):
                samples[second_input(name)].add(operands[1])

        return record

    handles = [layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with bypassed(model), evaluating(model):
            if not run_batches(model, batches_of(data, model)):
                raise BitscapeError("images: no batch; give at least one image, better a few hundred")
    finally:
        for handle in handles:
            handle.remove()
    return {name: sample.values() for name, sample in samples.items()}


BATCH_ELEMENTS = 1 << 20
"""Most input values in a batch, unless a batch size is given: with larger maps, memory and time grow."""


def batches_of(data: Data, model: nn.Module, batch_size: int | None = None) -> Iterator[Inputs]:
    """Yield the inputs of `data`, samples, a tensor, a mapping of keywords or batches of inputs, on the model's device.

    Batches pass one by one, so that memory does not grow with their number. Raises BitscapeError for a model or inputs
    that are not float32; indices and masks may stand beside.
    """
    check_float32(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable | Samples):
        check_inputs(data, model=model)
        data = Samples.of(data)
    if isinstance(data, Samples):
        largest = max(t.numel() // len(part) for part in data.parts for t in tensors_in(part.inputs))
        size = batch_size or min(32, max(2, BATCH_ELEMENTS // max(1, largest)))
        data = (batch.inputs for batch in data.batches(size))
    for inputs in data:
        check_inputs(inputs, model=model)
        yield map_tensors(_trackable, moved(inputs, device))


def _trackable(batch: Tensor) -> Tensor:
    """The batch, or a copy where it was made under torch.inference_mode: no gradient may pass those tensors."""
    return batch.clone() if batch.is_inference() else batch


def without_single_samples(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """`batches`, in which a batch of one sample joins the next one of its form, or the one before where it is the last."""
    before: list[Inputs] = []  # the last two, the later one perhaps a single sample
    for inputs in batches:
        if before and sample_count(before[-1]) == 1:
            before[-1:] = _joined(before[-1], inputs)
        else:
            before.append(inputs)
        while len(before) > 2:
            yield before.pop(0)
    yield from _joined(*before) if len(before) > 1 and sample_count(before[-1]) == 1 else before


def _joined(*batches: Inputs) -> list[Inputs]:
    """The batches as one; as they are where samples differ in form."""
    return [part.inputs for part in Samples(map(Minibatch, batches)).parts]


@contextmanager
def _naming(layer: str, what: str) -> Iterator[None]:
    try:
        yield
    except BitscapeError as error:
        raise BitscapeError(f"layer {layer}, {what}: {error}") from error


def recalibrate_norms(model: nn.Module, data: Data) -> nn.Module:
    """Replace the running statistics of every batch norm by the plain average over the batches of `data`, in place.

    For a network whose bits changed and that is not trained: quantized layers shift means and variances. About 50 batches are
    enough. A batch of one sample joins its neighbor, because a map of one pixel has no variance in it. After an exception the
    former statistics are back.

    Raises:
        BitscapeError: `data` holds no batch, or values of which a norm's statistics are not finite.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over all batches
                norm.train()
            if not run_batches(model, without_single_samples(batches_of(data, model, batch_size=128))):
                raise BitscapeError("images: no batch; give at least one, better about 50 batches of 128 images")
            _check_statistics(model)
            _put_back_unused(norms, before)
        except BaseException:
            for norm, (_, buffers) in zip(norms, before, strict=True):
                norm.load_state_dict(buffers, strict=False)
            raise
        finally:
            for norm, (momentum, _) in zip(norms, before, strict=True):
                norm.momentum = momentum
    return model


def _check_statistics(model: nn.Module) -> None:
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm) and not all(bool(buffer.isfinite().all()) for buffer in norm.buffers(recurse=False)):
            raise BitscapeError(
                f"images: the statistics of norm {name} on them are not finite; check the images, their normalization and the checkpoint"
            )


def _put_back_unused(norms: list[_BatchNorm], before: list[tuple[float | None, dict[str, Tensor]]]) -> None:
    for norm, (_, buffers) in zip(norms, before, strict=True):
        if norm.num_batches_tracked is not None and norm.num_batches_tracked == 0:
            _log.warning("a batch norm of %d channels never ran: its statistics stay as they were", norm.num_features)
            norm.load_state_dict(buffers, strict=False)


def run_batches(model: nn.Module, batches: Iterable[Inputs]) -> int:
    """Run every batch, and count the samples."""
    count = 0
    for inputs in batches:
        with explained_forward(inputs):
            call(model, inputs)
        count += sample_count(inputs)
    return count
