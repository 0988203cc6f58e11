"""bs.analyze: a network and a few samples in; which of its layers the error comes from out."""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from bitscape.data.samples import Samples
from bitscape.engine.forward import samples_at_once
from bitscape.engine.task import SAMPLE, Task, TaskName, task_of
from bitscape.errors import BitscapeError, at_least_one
from bitscape.measure.analysis.layers import layer_noise
from bitscape.measure.analysis.outputs import output_errors
from bitscape.measure.analysis.result import Analysis, LayerAnalysis
from bitscape.measure.analysis.twins import Twins
from bitscape.models.dtypes import check_module
from bitscape.models.layers import layer_shapes
from bitscape.models.modes import in_eval_mode
from bitscape.models.products import product_names
from bitscape.policy import LayerBits, Policy, fingerprint, uniform_policy
from bitscape.quant.convert import batches_of, calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.layers import quantized_layers
from bitscape.signatures import checked
from bitscape.verbs.proxy import proxy_of

_log = logging.getLogger("bitscape.verbs")
USUAL_BITS = LayerBits(4, 8)
"""At which a float network is analyzed."""
AT_ONCE = 8
"""Samples of a batch, at most."""


@checked
def analyze(
    network: nn.Module,
    data: Any,
    bits: Policy | LayerBits | str | None = None,
    *,
    reference: nn.Module | None = None,
    task: TaskName | Literal["auto"] | Task = "auto",
    attention_products: bool = False,
    count: int = 256,
    compared: int = 16,
    inputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Analysis:
    """Find the layers that a network's quantization error comes from.

    Each layer is looked at by itself on the float network's activations: signal to noise of weight,
    input and output, ranges, outliers. Then the outputs are compared with each layer alone
    quantized, and with each layer alone float, which takes two passes a layer. Labels are not used.

    Args:
        network: float, which is quantized here, norms folded and nothing repaired; or quantized,
            for instance by `quantize`. It is not changed.
        data: samples like those the network will see; see `search`.
        bits: of a float network: a policy, or the same for every layer, e.g. "4/8"; None: "4/8". A
            quantized network has its own.
        reference: of a quantized network: the float one it was made of. None: the weights before
            its quantizers count as float, as after training; repaired and packed networks need it.
        task: what the outputs mean, see `search`; decides the divergence.
        attention_products: of a float network: quantize the two products of attention too.
        count: most samples that are used.
        compared: of these, samples whose outputs are compared; time grows with it.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        seed: of the samples drawn.

    Raises:
        PolicyError: a policy of another network.
        BitscapeError: any other argument that cannot be used.
    """
    started = time.perf_counter()
    check_module(network, "network")
    at_least_one(compared=compared)
    samples = proxy_of(network, data, count=count, inputs=inputs, seed=seed)
    if quantized_layers(network):
        _check_unused(bits=bits, attention_products=attention_products or None)
        twins = Twins.of(network, reference, samples)
    else:
        _check_float(reference)
        policy = _policy(network, bits, attention_products=attention_products)
        folded = fold_norms(network, samples.first(2))
        quantized = in_eval_mode(calibrate(with_quantizers(folded, policy), samples))
        twins = Twins.of(quantized, folded, samples)
    meaning = _meaning(twins.twin, samples, task)
    at_once = samples_at_once(twins.twin, samples.first(2).parts[0].inputs, most=AT_ONCE)
    noise = layer_noise(twins, samples, at_once)
    few = samples.first(compared)
    errors = output_errors(twins, list(noise), few, meaning, at_once)
    layers = {
        name: LayerAnalysis(noise=own, alone=errors.alone[name], others=errors.others[name])
        for name, own in noise.items()
    }
    return Analysis(
        task=meaning.name,
        samples=len(samples),
        compared=len(few),
        seconds=time.perf_counter() - started,
        fingerprint=fingerprint(layer_shapes(twins.network)),
        whole=errors.whole,
        weights=errors.weights,
        inputs=errors.inputs,
        layers=layers,
    )


def _policy(
    model: nn.Module, bits: Policy | LayerBits | str | None, *, attention_products: bool
) -> Policy:
    if isinstance(bits, Policy):
        return bits
    names = [*layer_shapes(model), *(product_names(model) if attention_products else [])]
    if isinstance(bits, str):
        bits = LayerBits.parse(bits)
    return uniform_policy(names, USUAL_BITS if bits is None else bits)


def _meaning(twin: nn.Module, samples: Samples, task: TaskName | Literal["auto"] | Task) -> Task:
    if not isinstance(task, str):
        return task
    meaning = task_of(twin, next(batches_of(samples, twin, SAMPLE)), task)
    if task == "auto":
        _log.info("the outputs are taken as task %s; task=... says otherwise", meaning.name)
    return meaning


def _check_unused(**arguments: Any) -> None:
    """Raise BitscapeError for arguments that a quantized network makes no use of."""
    if unused := [name for name, value in arguments.items() if value is not None]:
        raise BitscapeError(
            f"{unused[0]}: the network is quantized already and has its bits; leave "
            f"{' and '.join(unused)} out, or give the float network"
        )


def _check_float(reference: nn.Module | None) -> None:
    if reference is not None:
        raise BitscapeError(
            "reference: the network is float itself; leave reference out, or give the quantized "
            "network as network="
        )
