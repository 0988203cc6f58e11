"""Hailo's Dataflow Compiler: lines of a model script (.alls) that set the precision of each layer.

    quantization_param([net/conv1, net/conv2], precision_mode=a8_w4)

The compiler's parser gives layers names of its own, in its file as "original_names" beside those of
the ONNX file; the caller says which is which. The compiler is not in public registries: the lines
follow its documents and were not run.
"""

from collections.abc import Mapping

from bitscape.adapters.widths import Rounding, offered_bits
from bitscape.errors import BitscapeError
from bitscape.policy import Policy

NAME = "Hailo's compiler"
MODES = {(4, 8): "a8_w4", (8, 8): "a8_w8", (16, 16): "a16_w16"}
"""Bits of weights and activations -> precision mode."""


def to_hailo(policy: Policy, names: Mapping[str, str], *, rounding: Rounding = "exact") -> str:
    """Return the policy as lines of a Hailo model script.

    Args:
        policy: bits of every layer.
        names: layer -> its name in Hailo's compiler.
        rounding: of widths that the compiler lacks: "exact" raises an error, "up" takes the next
            wider ones.

    Raises:
        BitscapeError: a layer without a name, an unknown rounding, or widths that the compiler
            lacks.
    """
    if missing := [name for name in policy.layers if name not in names]:
        raise BitscapeError(
            f"names: none for layer {missing[0]!r}; give the name of every layer in Hailo's "
            "compiler"
        )
    pairs = offered_bits(policy, dict.fromkeys(policy.layers, tuple(MODES)), rounding, NAME)
    lines = []
    for pair, mode in MODES.items():
        if layers := [names[name] for name, bits in pairs.items() if bits == pair]:
            lines.append(f"quantization_param([{', '.join(layers)}], precision_mode={mode})\n")
    return "".join(lines)
