"""ExecuTorch's Arm backend: for each module the arguments of its quantization config.

    from executorch.backends.arm.quantizer import get_symmetric_quantization_config

    for name, limits in adapters.to_executorch_arm(policy)["a8"].items():
        quantizer.set_module_name(name, get_symmetric_quantization_config(**limits))

Weights of b bits are int8 tensors with codes from -(2^(b-1) - 1) to 2^(b-1) - 1: 7 on either side
is what the backend itself calls a8w4. Its compiler then stores them in about b bits. "a16" holds
the modules with activations of 16 bits, for its config for 16-bit activations; "float" those that
are not quantized.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from bitscape.adapters.widths import FLOAT, Rounding, offered_bits
from bitscape.policy import MAX_BITS, WIDE_BITS, Policy

NAME = "ExecuTorch's Arm backend"
OFFERED = (
    *((weight, activation) for activation in (8, WIDE_BITS) for weight in range(2, MAX_BITS + 1)),
    FLOAT,
)
ArmKind = Literal["a8", "a16", "float"]
_KINDS: Mapping[int, ArmKind] = {8: "a8", WIDE_BITS: "a16", FLOAT[1]: "float"}
Limits: TypeAlias = dict[str, int]


def to_executorch_arm(
    policy: Policy, *, rounding: Rounding = "exact"
) -> dict[ArmKind, dict[str, Limits]]:
    """Return the policy as arguments of ExecuTorch's quantization configs for Arm's NPUs.

    Args:
        policy: bits of every layer.
        rounding: of widths that the backend lacks: "exact" raises an error, "up" takes the next
            wider ones.

    Returns:
        "a8", "a16" and "float" -> module name -> keywords `weight_qmin` and `weight_qmax`, of float
        modules none.

    Raises:
        BitscapeError: an unknown rounding, or widths that the backend lacks.
    """
    modules: dict[ArmKind, dict[str, Limits]] = {kind: {} for kind in _KINDS.values()}
    pairs = offered_bits(policy, dict.fromkeys(policy.layers, OFFERED), rounding, NAME)
    for name, (weight, activation) in pairs.items():
        most = 2 ** (weight - 1) - 1
        limits = (
            {} if (weight, activation) == FLOAT else {"weight_qmin": -most, "weight_qmax": most}
        )
        modules[_KINDS[activation]][name] = limits
    return modules
