"""bs.quantize: a float network, a policy and a few samples in; a quantized network out."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from bitscape.models.modes import in_eval_mode
from bitscape.policy import Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.quantizers import Lsq, Quantizer
from bitscape.quant.repair import repair as repaired
from bitscape.verbs.proxy import proxy_of

DEFAULT_QUANTIZER = Lsq()


def quantize(
    model: nn.Module,
    policy: Policy,
    data: Any,
    *,
    repair: Literal["compensate", "adaptive"] | None = "compensate",
    for_training: bool = False,
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    count: int = 256,
    inputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of `model` at the bits of `policy`, in eval mode.

    Norms are folded, ranges set, rounding and biases repaired. The result is an ordinary `nn.Module` with the float
    network's layer names. Labels are not used.

    Args:
        model: float network; it is not changed.
        policy: bits of every layer, e.g. `search(...).policy`.
        data: samples like those the network will see, of one shape or several; see `search`.
        repair: how rounding is repaired: "compensate" (seconds), "adaptive" (minutes), or None for neither rounding nor biases.
        for_training: keep norms, which training adapts; their statistics take the correction of biases.
        quantizer: how weights and activations are laid on their grids; repair needs `Lsq` or `LsqPlus`.
        count: most samples that are used.
        inputs: from a batch to what the network is called with, a tensor, a tuple of arguments or a mapping of keywords;
            see `BatchReader`.
        seed: of the samples drawn.

    Raises:
        PolicyError: a policy of another network.
        BitscapeError: any other argument that cannot be used.
    """
    samples = proxy_of(model, data, count=count, inputs=inputs, seed=seed)
    if not for_training:
        model = fold_norms(model, samples.first(2))
    network = calibrate(with_quantizers(model, policy, quantizer), samples)
    return in_eval_mode(network if repair is None else repaired(network, model, samples, rounding=repair))
