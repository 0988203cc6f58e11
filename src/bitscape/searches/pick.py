"""Which of several policies with near-equal scores to keep: the best-scored, or the least sharp.

Scores differ by less than they are wrong where policies are near-equal, so that something else may decide. SAQ (Liu, Cai,
Zhuang, arXiv 2111.12273v1) keeps, of the policies its controller samples, the one whose quantized network has the least
sharp loss. Here the candidates come from the exact allocation instead, for any method that scores.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from bitscape.calling import call, sample_count
from bitscape.data.samples import Samples
from bitscape.errors import BitscapeError
from bitscape.models.modes import evaluating
from bitscape.policy import Policy
from bitscape.progress import track
from bitscape.quant.convert import batches_of, calibrate, quantize
from bitscape.searches.allocation import allocate, near_best
from bitscape.searches.problem import Pick, SearchProblem, only_tensor
from bitscape.searches.scores import ScoreTable
from bitscape.sharpness import BatchLoss, probe_sharpness


def check_pick(pick: Pick) -> None:
    """Raise BitscapeError for a `pick` that is none."""
    if pick not in get_args(Pick):
        raise BitscapeError(f"pick={pick!r}: allowed are {', '.join(map(repr, get_args(Pick)))}")


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

    Of equal gaps the first policy wins; a gap that is not a number loses. The loss on classes is the cross entropy of what
    the float network decides for each image, which stands in for true labels: a proxy may not have them or may have those
    of other classes. On other tasks it is the task's divergence from the float network's outputs.

    Args:
        problem: the float network and the proxy images.
        policies: at least one, by ascending score, as `near_best` returns them.
        images: proxy images to calibrate and to probe with, from 1.
        radius: of the probe; see `probe_sharpness`.

    Returns:
        The policy, and for each policy its "score", the probe's "gap" and "curvature", and "layers_changed": in how many
        layers its bits differ from the first policy's.
    """
    proxy = problem.samples.first(images)
    inputs, (targets, loss) = only_tensor(proxy), _targets_and_loss(problem, proxy)
    records = []
    for policy in track(policies, label="least sharp: policy"):
        model = calibrate(quantize(problem.prepared, policy), batches_of(proxy, problem.prepared))
        probed = probe_sharpness(model, inputs, targets, radius=radius, loss=loss)
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


def _targets_and_loss(problem: SearchProblem, proxy: Samples) -> tuple[Tensor, BatchLoss]:
    """What the outputs of each sample are compared with, (n, ...), and the loss that does so."""
    task = problem.meaning
    if task.name == "classes":
        return problem.decisions(proxy), functional.cross_entropy
    with evaluating(problem.prepared):
        rows = [task.outputs(call(problem.prepared, inputs), sample_count(inputs)) for inputs in batches_of(proxy, problem.prepared)]
    return torch.cat(rows).detach(), lambda output, targets: task.divergence(task.outputs(output, len(targets)), targets).mean()
