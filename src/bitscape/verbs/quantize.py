"""bs.quantize: a float network, a policy and a few samples in; a quantized network out."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from bitscape.engine.task import Task, TaskName, task_of
from bitscape.errors import BitscapeError, nearest
from bitscape.models.modes import in_eval_mode
from bitscape.policy import Policy
from bitscape.quant.convert import calibrate, with_quantizers
from bitscape.quant.fold import fold_norms
from bitscape.quant.quantizers import Lsq, Quantizer
from bitscape.quant.repair import repair as repaired
from bitscape.signatures import checked
from bitscape.tuning.reconstruct import reconstruct
from bitscape.tuning.tune import tune
from bitscape.verbs.proxy import HELD_OUT, parted, proxy_of
from bitscape.words import counted

Repair = Literal["compensate", "adaptive", "tune", "reconstruct"]
_TUNINGS: dict[str | None, Callable[..., nn.Module]] = {"tune": tune, "reconstruct": reconstruct}
"""Words of `repair` that train."""


@checked
def quantize(
    model: nn.Module,
    policy: Policy,
    data: Any,
    *,
    repair: Repair | None = "compensate",
    for_training: bool = False,
    quantizer: Quantizer | None = None,
    count: int = 256,
    task: TaskName | Literal["auto"] | Task = "auto",
    folder: str | os.PathLike[str] | None = None,
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
        repair: what is done about the errors of rounding. "compensate" (seconds) lets roundings of a layer cancel, and
            corrects biases; "adaptive" (minutes) trains the roundings of each layer, and corrects biases. "tune" and
            "reconstruct" (minutes) go on from "compensate" and train codes, scales and biases on three quarters of the
            samples: of all layers together, or block by block. What does not follow the float network better on the
            quarter held out is taken back. None: nothing is done.
        for_training: keep norms, which training adapts; their statistics take the correction of biases.
        quantizer: how weights and activations are laid on their grids; repair needs `Lsq` or `LsqPlus`. None: `Lsq`, of
            the coarseness of the table that the policy was found by.
        count: most samples that are used.
        task: what the outputs mean, for the words that train; see `search`.
        folder: where the words that train keep their checkpoint; the same call goes on from there.
        inputs: from a batch to what the network is called with, a tensor, a tuple of arguments or a mapping of keywords;
            see `BatchReader`.
        seed: of the samples drawn, and of their order in training.

    Raises:
        PolicyError: a policy of another network.
        BitscapeError: any other argument that cannot be used.
    """
    check_repair(repair, folder)
    quantizer = quantizer or _quantizer_of(policy)
    samples = proxy_of(model, data, count=count, inputs=inputs, seed=seed)
    if not for_training:
        model = fold_norms(model, samples.first(2))
    train = _TUNINGS.get(repair)
    if train is None:
        network = calibrate(with_quantizers(model, policy, quantizer), samples)
        return in_eval_mode(network if repair is None else repaired(network, model, samples, rounding=repair))
    if len(samples) < HELD_OUT:
        raise BitscapeError(
            f"data: {counted(len(samples), 'sample')}; repair={repair!r} needs at least {HELD_OUT}, better 256, "
            "of which it holds a quarter out"
        )
    seen, held_out = parted(samples)
    network = repaired(calibrate(with_quantizers(model, policy, quantizer), seen), model, seen)
    meaning = task_of(model, seen.parts[0].inputs, task) if isinstance(task, str) else task
    return in_eval_mode(train(network, model, seen, held_out, meaning, seed=seed, folder=folder))


def _quantizer_of(policy: Policy) -> Lsq:
    source = policy.provenance.get("latency")
    return Lsq(coarseness=source.get("coarseness", 1.0) if isinstance(source, Mapping) else 1.0)


def check_repair(repair: object, folder: object) -> None:
    """Raise BitscapeError for an unknown word, and for a folder that it would not use."""
    words = get_args(Repair)
    if repair is not None and repair not in words:
        raise BitscapeError(
            f"repair={repair!r}: allowed are {', '.join(map(repr, words))} and None{nearest(str(repair), words)}"
        )
    if folder is not None and repair not in _TUNINGS:
        raise BitscapeError(
            f"folder={str(folder)!r}: repair={repair!r} keeps nothing there; leave it out, or use "
            f"{' or '.join(f'repair={word!r}' for word in _TUNINGS)}"
        )
