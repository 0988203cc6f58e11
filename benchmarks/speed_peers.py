"""LSQ's job by other toolkits: 4-bit weights and inputs of layers, both ends at 8.

Brevitas: layers swapped for its own, every weight and input with a scale that is a parameter; a
scale per output channel, and per tensor for inputs. PT2E: torchao's quantization of exported graphs
for x86, as it is except for the bits; scales follow ranges that are averaged over steps, so that no
gradient is computed for them, and norms are folded into the weights in every step.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import published
from bitscape.cost.layers import measure

PEER_DTYPES = {
    "brevitas": ("float32", "bfloat16"),
    "pt2e": ("float32",),  # its fused operators refuse bfloat16 as soon as a layer's input has it
}
"""Each peer, and the types that it trains in."""


def bits_of_layer(name: str, ends: Collection[str]) -> int:
    """Bits of a layer's weights and inputs."""
    return 8 if name in ends else 4


def brevitas_network(network: str, images: Tensor) -> nn.Module:
    """The network with Brevitas's layers."""
    model = published(network)
    ends = measure(model, tuple(images.shape[1:])).ends
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            model.set_submodule(name, _brevitas_layer(layer, bits_of_layer(name, ends)))
    return model


def _brevitas_layer(layer: nn.Conv2d | nn.Linear, bits: int) -> nn.Module:
    from brevitas import nn as layers
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    quantizers = {
        "weight_quant": Int8WeightPerTensorFloat.let(
            bit_width=bits,
            scaling_impl_type="parameter_from_stats",
            scaling_per_output_channel=True,
        ),
        # Scales are parameters from the second step on, before the clock starts.
        "input_quant": Int8ActPerTensorFloat.let(bit_width=bits, collect_stats_steps=1),
        "bias": layer.bias is not None,
    }
    made: nn.Module
    if isinstance(layer, nn.Linear):
        made = layers.QuantLinear(layer.in_features, layer.out_features, **quantizers)
    else:
        made = layers.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
            **quantizers,
        )
    made.load_state_dict(layer.state_dict(), strict=False)
    return made


def pt2e_network(network: str, images: Tensor) -> nn.Module:
    """The network's exported graph with torchao's fake-quantizers."""
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    model = published(network).train()
    ends = measure(model, tuple(images.shape[1:])).ends
    quantizer = X86InductorQuantizer().set_global(_pt2e_config(4))
    for name in ends:
        quantizer.set_module_name_qconfig(name, _pt2e_config(8))
    graph = torch.export.export(model, (images,)).module()
    prepared: nn.Module = prepare_qat_pt2e(graph, quantizer)
    pt2e.allow_exported_model_train_eval(prepared)
    return prepared


def _pt2e_config(bits: int) -> Any:
    """Torchao's default for training on x86, at these bits instead of 8."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    default = x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_qat=True)
    half = 2 ** (bits - 1)
    inputs = dataclasses.replace(default.input_activation, quant_min=0, quant_max=2 * half - 1)
    weight = dataclasses.replace(default.weight, quant_min=-half, quant_max=half - 1)
    return dataclasses.replace(
        default, input_activation=inputs, output_activation=inputs, weight=weight
    )
