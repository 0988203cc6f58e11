"""A float network and a policy in, a quantized network out; calibration and norm statistics."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitscape.calling import Inputs, call, map_tensors, moved, sample_count
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError, explained_forward
from bitscape.models.dtypes import check_float32, check_images
from bitscape.models.layers import layer_shapes, quantizable_layers
from bitscape.models.modes import evaluating
from bitscape.models.prepare import prepare
from bitscape.models.trial import check_weight_uses
from bitscape.policy import Policy
from bitscape.quant.layers import quantized_class, quantized_layers, require_float
from bitscape.quant.observers import Mse, Observer
from bitscape.quant.quantizers import FakeQuantizer, Lsq, Quantizer
from bitscape.quant.samples import ValueSample

_log = logging.getLogger("bitscape.quant")
_DEFAULT_QUANTIZER = Lsq()
_DEFAULT_OBSERVER = Mse()


def quantize(
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
        policy: bits of every Conv1d, Conv2d and Linear; those of nn.MultiheadAttention are q_proj, k_proj, v_proj and out_proj.
            Layers with `LayerBits.FLOAT` are left as they are.
        quantizer: how weights and activations are laid on their grids.
        observer: where weight scales start.

    Raises:
        PolicyError: unknown or missing layers, or a policy of another network.
        BitscapeError: a model that is quantized already, not float32, or that `models.prepare` refuses;
            weights that are not finite (the layer is named).
    """
    check_float32(model)
    require_float(model)
    if not isinstance(policy, Policy):
        kind = type(policy).__name__
        raise BitscapeError(f"policy: {kind} is no Policy; read a file with Policy.load(path), or use uniform_policy(names, bits)")
    model = prepare(model, inplace=inplace)
    policy.check(layer_shapes(model))
    layers = {name: layer for name, layer in quantizable_layers(model).items() if not policy.layers[name].is_float}
    weight_quantizers = _weight_quantizers(layers, policy, quantizer, observer)
    for name, layer in layers.items():
        # In place, and by class: see layers.py.
        layer.__class__ = quantized_class(type(layer))
        layer.weight_quantizer = weight_quantizers[name]
        layer.input_quantizer = quantizer.for_activation(policy.layers[name].activation).to(layer.get_parameter("weight").device)
    return model


def _weight_quantizers(
    layers: Mapping[str, nn.Module], policy: Policy, quantizer: Quantizer, observer: Observer
) -> dict[str, FakeQuantizer]:
    """One for each layer, its scales set; layers that share a weight at the same bits share the quantizer, so that they stay alike."""
    made: dict[tuple[nn.Parameter, int], FakeQuantizer] = {}
    by_name = {}
    for name, layer in layers.items():
        weight, bits = layer.get_parameter("weight"), policy.layers[name].weight
        if (weight, bits) not in made:
            made[weight, bits] = quantizer.for_weight(weight, bits)
            with _naming(name, "weight"):
                made[weight, bits].initialize(weight, observer)
        by_name[name] = made[weight, bits].to(weight.device)
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


def calibrate(model: nn.Module, images: Tensor | Iterable[Tensor], observer: Observer = _DEFAULT_OBSERVER) -> nn.Module:
    """Set the activation scales of a quantized `model` from `images`, in place; no labels are needed.

    Args:
        model: what `quantize` returned.
        images: normalized float32 (n, c, h, w), or batches of them; a few hundred images are enough.
        observer: how a range is chosen from the values seen.

    Raises:
        BitscapeError: no quantized layer, a weight that is used outside of its layer too, or
            activations that are not finite (the layer is named).
    """
    layers = quantized_layers(model)
    if not layers:
        raise BitscapeError("model: it has no quantized layer; call bitscape.quantize(model, policy) first")
    batches = batches_of(images, model)
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
    return model


def record_inputs(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor | Iterable[Tensor]) -> dict[str, Tensor]:
    """Run the network in float and return, for each of `layers` that ran, a 1-d sample of its input values with both extremes."""
    samples: defaultdict[str, ValueSample] = defaultdict(ValueSample)
    generator = torch.Generator().manual_seed(0)

    def hook_for(name: str) -> Callable[..., None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
            samples[name].add(inputs[0] if inputs else named["input"], generator)

        return record

    handles = [layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with bypassed(model), evaluating(model):
            if not run_batches(model, batches_of(images, model)):
                raise BitscapeError("images: no batch; give at least one image, better a few hundred")
    finally:
        for handle in handles:
            handle.remove()
    return {name: sample.values() for name, sample in samples.items()}


def batches_of(data: Samples | Tensor | Iterable[Inputs], model: nn.Module, batch_size: int = 32) -> Iterator[Inputs]:
    """Yield the inputs of `data`, samples, a tensor or batches of inputs, in batches on the model's device.

    Raises BitscapeError for a model, or an only input, that is not float32.
    """
    check_float32(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(data, Tensor) or not isinstance(data, Iterable | Samples):
        check_images(data, model=model)
        data = Samples.of(data)
    batches = (batch.inputs for batch in data.batches(batch_size)) if isinstance(data, Samples) else data
    for inputs in batches:
        if isinstance(inputs, Tensor):
            check_images(inputs, model=model)
        yield map_tensors(_trackable, moved(inputs, device))


def _trackable(batch: Tensor) -> Tensor:
    """The batch, or a copy where it was made under torch.inference_mode: no gradient may pass those tensors."""
    return batch.clone() if batch.is_inference() else batch


def without_single_images(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """`batches`, in which a batch of one image joins the next one, or the one before where it is the last."""
    before: list[Tensor] = []  # the last two, the later one perhaps a single image
    for batch in batches:
        if before and len(before[-1]) == 1:
            before[-1] = torch.cat([before[-1], batch])
        else:
            before.append(batch)
        if len(before) > 2:
            yield before.pop(0)
    if len(before) > 1 and len(before[-1]) == 1:
        before = [torch.cat(before)]
    yield from before


@contextmanager
def _naming(layer: str, what: str) -> Iterator[None]:
    try:
        yield
    except BitscapeError as error:
        raise BitscapeError(f"layer {layer}, {what}: {error}") from error


def recalibrate_norms(model: nn.Module, images: Tensor | Iterable[Tensor]) -> nn.Module:
    """Replace the running statistics of every batch norm by the plain average over the batches of `images`, in place.

    For a network whose bits changed and that is not trained: quantized layers shift means and variances. About 50 batches are
    enough. A batch of one image joins its neighbor, because a map of one pixel has no variance in it. After an exception the
    former statistics are back.

    Raises:
        BitscapeError: `images` holds no batch, or values of which a norm's statistics are not finite.
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
            if not run_batches(model, without_single_images(batches_of(images, model, batch_size=128))):
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
