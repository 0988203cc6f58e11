"""Which of several policies with near-equal scores to keep: the best-scored, or the least sharp.

Scores differ by less than they are wrong where policies are near-equal, so that something else may decide. SAQ (Liu, Cai,
Zhuang, arXiv 2111.12273v1) keeps, of the policies its controller samples, the one whose quantized network has the least
sharp loss. Here the candidates come from the exact allocation instead, for any method that scores.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch

from bitscape.data.samples import Samples
from bitscape.engine.following import outputs_on
from bitscape.engine.task import Classes
from bitscape.errors import BitscapeError
from bitscape.policy import Policy
from bitscape.progress import track
from bitscape.quant.convert import batches_of, calibrate, with_quantizers
from bitscape.searches.allocation import allocate, near_best
from bitscape.searches.problem import Pick, SearchProblem, inputs_alone
from bitscape.searches.scores import ScoreTable
from bitscape.sharpness import BatchLoss, probe_sharpness


def check_pick(pick: Pick, samples: Samples | None = None) -> None:
    """Raise BitscapeError for a `pick` that is none, and for samples that it cannot probe with."""
    if pick not in get_args(Pick):
        raise BitscapeError(f"pick={pick!r}: allowed are {', '.join(map(repr, get_args(Pick)))}")
    if pick == "least-sharp" and samples is not None:
        inputs_alone(samples)


def chosen(problem: SearchProblem, scores: ScoreTable, pick: Pick) -> tuple[Policy, tuple[dict[str, Any], ...]]:
    """Return the policy within the budget that `pick` asks for, and the trace: one record per policy that was probed.

    "best" is `allocate`; "least-sharp" is the `least_sharp` of `near_best`, 8 policies within 1 %. Raises InfeasibleBudget.
    """
    if pick == "best":
        return allocate(scores, problem.choices), ()
    policy, records = least_sharp(problem, near_best(scores, problem.choices))
    return policy, tuple(records)


def least_sharp(
    problem: SearchProblem, policies: Sequence[Policy], *, images: int = 128, radius: float = 0.05
) -> tuple[Policy, list[dict[str, Any]]]:
    """Return the policy whose quantized, calibrated network has the smallest sharpness gap, and a record per policy.

    Of equal gaps the first policy wins; a gap that is not a number loses. The loss of classes is that of the labels which the
    float network decides for: they stand in for true ones, which a proxy may not have or may have of other classes. The loss
    of any other task is its divergence from the float network's outputs.

    Args:
        problem: the float network and the proxy samples, all of one shape.
        policies: at least one, by ascending score, as `near_best` returns them.
        images: proxy images to calibrate and to probe with, from 1.
        radius: of the probe; see `probe_sharpness`.

    Returns:
        The policy, and for each policy its "score", the probe's "gap" and "curvature", and "layers_changed": in how many
        layers its bits differ from the first policy's.
    """
    proxy = problem.samples.first(images)
    aims, loss = _aims(problem, proxy)
    records = []
    for policy in track(policies, label="least sharp: policy"):
        model = calibrate(with_quantizers(problem.prepared, policy, problem.quantizer), batches_of(proxy, problem.prepared))
        probed = probe_sharpness(model, inputs_alone(proxy).inputs, aims, radius=radius, loss=loss)
        records.append(
            {
                "score": policy.provenance["score"],
                "gap": probed.gap,
                "curvature": probed.curvature,
                "layers_changed": len(policy.difference(policies[0])),
            }
        )
    gaps = [math.inf if math.isnan(record["gap"]) else record["gap"] for record in records]
    return policies[gaps.index(min(gaps))], records


def _aims(problem: SearchProblem, samples: Samples) -> tuple[Any, BatchLoss]:
    """What a quantized network should return for the samples, a row for each, and how far it is from that."""
    task, network = problem.meaning, problem.prepared
    if isinstance(task, Classes):
        return problem.decisions(samples), lambda output, labels: task.loss(task.read(output, len(labels)), labels)
    outputs = torch.cat(outputs_on(network, samples, task))
    return outputs, lambda output, aims: task.divergence(task.outputs(output, len(aims)), aims).mean()
