"""bs.search: a float network, a few samples and a budget in; a policy out."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from bitscape.cost.budget import Budget, BudgetText, check_form, lasting, split_drop
from bitscape.cost.latency import LatencyTable
from bitscape.cost.targets import TARGETS, Target
from bitscape.engine.task import Task, TaskName
from bitscape.errors import BitscapeError, nearest
from bitscape.models.dtypes import check_module
from bitscape.models.prepare import prepare
from bitscape.policy import LayerBits
from bitscape.searches.choices import offered_pairs
from bitscape.searches.freedom import Pins
from bitscape.searches.methods import METHODS, SearchMethod
from bitscape.searches.pick import check_pick
from bitscape.searches.problem import Pick, SearchProblem, SearchResult, check_samples, name_of
from bitscape.signatures import checked
from bitscape.verbs.drop import ALONG, check_scores, quality_of, smallest_within
from bitscape.verbs.proxy import proxy_of
from bitscape.verbs.refine import refined

SAMPLES = 256
"""Used by default."""
COARSE = ("fisher", "uniform", "random")
"""Methods that scales of any coarseness make no difference to, or that score them."""
MOST_EVALUATED = 50_000
"""Samples on which a drop is measured, held in memory."""


@checked
def search(
    model: nn.Module,
    data: Any,
    budget: BudgetText,
    *,
    method: str | SearchMethod = "fisher",
    task: TaskName | Literal["auto"] | Task = "auto",
    count: int | None = None,
    candidates: Sequence[LayerBits] | None = None,
    pinned: Mapping[str, LayerBits | str] | Pins | None = None,
    keep_float: Sequence[str | type[nn.Module]] = (),
    tied: Sequence[Sequence[str]] = (),
    target: str | Target | None = None,
    latency: LatencyTable | None = None,
    for_training: bool = False,
    pick: Pick = "best",
    attention_products: bool = False,
    inputs: Callable[[Any], Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    evaluation: Any = None,
    metric: Any = None,
    refine: int = 0,
    folder: str | os.PathLike[str] | None = None,
    channels_last: bool | None = None,
    seed: int = 0,
) -> SearchResult:
    """Find the bits of each layer within a budget that is never exceeded.

    Args:
        model: float network; it is not changed.
        data: samples, preprocessed for the network; no labels are needed. A tensor (n, ...), an iterable of batches such as
            a DataLoader, a torch or Hugging Face dataset, or `Batches`. Costs are counted on the first sample.
        budget: one or several caps, e.g. "4bit" (the bytes of 4-bit weights in every layer), "bitops=0.25x",
            "weight_bytes=1.2MB" or ["bitops=w4a4", "weight_bytes=w4"]. Or a drop: "drop=0.5" finds the smallest policy, by
            weight bytes, whose metric stays within 0.5 of the float network's; caps beside it hold too.
        method: name of a search method (`bitscape methods` lists them), or its settings, e.g. `Fisher(images=512)`.
        task: what the outputs are: "classes" for logits (n, k), "binary", "follow" for any others; "auto" looks at them.
        count: most samples that are used; None: 256, or as many as the method's `images` if these are more. Of a dataset
            they are drawn by `seed`, of an iterable they are the first.
        candidates: pairs of bits that a layer may get; None offers all pairs of 2, 3, 4, 5, 6 and 8 bits, of these what
            the target has.
        pinned: layers with fixed bits, by name or pattern, e.g. {"head*": "8/8"}; {} pins none. None pins the first layer
            and the heads at 8/8; under a cap on weights alone, only the first layer, and the heads keep 8-bit activations.
        keep_float: names, patterns or types of layers that stay float, e.g. ["head*", nn.LayerNorm].
        tied: groups of layers that must get the same bits.
        target: what the network will run on, e.g. "openvino": only bits that it stores and computes are offered.
        latency: measured times of this network, which make `latency_ms` a cap. Of a compiler's table at a coarseness
            other than 1, the policy is for weights of these scales, which `quantize` gives it.
        for_training: whether the network will be trained at its bits afterwards; fisher then scores differently.
        pick: "best", or the "least-sharp" of the policies with near-equal scores, without a drop.
        attention_products: give bits to the two products of attention too ("attn.scores", "attn.values"): `weight` is the
            width of the second operand. Of the methods that measure, fisher and local take them.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        targets: from a batch to its labels, which searches that train make use of.
        evaluation: data with targets on which a drop is measured; None: `data`, which then needs targets.
        metric: what a drop is measured by, as `evaluate` takes it, larger is better; None: the task's, which is top-1, accuracy
            or mean IoU, in points, and for follow the relative error of the outputs to the float network's, a fraction.
        refine: so many policies are quantized, repaired and compared by their outputs' divergence from the float network's,
            and the best one is kept; 0: the scores alone decide. 50 take one to a few minutes on small networks.
        folder: where a search that trains keeps its checkpoint, and one that measures its evaluations; the same call goes
            on from there.
        channels_last: memory format of the convolutions; None: channels_last where the network takes it.
        seed: of everything random.

    Raises:
        InfeasibleBudget: no policy meets the budget; the message says what would.
        BitscapeError: any other argument that cannot be used.
    """
    searcher = method_of(method)
    budget = lasting(budget)
    drop, caps = split_drop(budget)
    check_request(
        searcher,
        budget,
        pick=pick,
        refine=refine,
        for_training=for_training,
        folder=folder,
        candidates=candidates,
        target=target,
        latency=latency,
    )
    if drop is None:
        _check_unmeasured(evaluation=evaluation, metric=metric)
    problem = search_problem(
        prepare(model, attention_products=True) if attention_products else model,
        data,
        budget if drop is None else caps or Budget(),
        count=samples_for(searcher) if count is None else count,
        inputs=inputs,
        targets=targets,
        candidates=candidates,
        pinned=pinned,
        keep_float=keep_float,
        tied=tied,
        target=target,
        latency=latency,
        task=task,
        channels_last=channels_last,
        seed=seed,
        along=None if drop is None else ALONG,
        original=model,
    )
    problem.choices.check_feasible()  # refused before the minutes that scores may take
    if drop is None:
        options: dict[str, Any] = {"pick": pick, "folder": folder, "for_training": for_training}
        result = searcher.search(problem, **{name: options[name] for name in searcher.options})
        if refine:
            result = refined(problem, result, refine, folder)
    else:
        measured = problem.samples
        if evaluation is not None:
            measured = proxy_of(model, evaluation, count=MOST_EVALUATED, inputs=inputs, targets=targets, seed=seed)
        check_samples(measured, model)
        quality = quality_of(problem, measured, metric)
        result = smallest_within(problem, searcher, drop, quality, measured, for_training=for_training, folder=folder)
    provenance = {**result.policy.provenance, "for_training": for_training}
    return replace(result, policy=replace(result.policy, provenance=provenance))


def search_problem(
    model: nn.Module,
    data: Any,
    budget: Budget | BudgetText,
    *,
    count: int,
    inputs: Callable[[Any], Any] | None,
    targets: Callable[[Any], Any] | None,
    seed: int,
    target: str | Target | None = None,
    **settings: Any,
) -> SearchProblem:
    """Read the samples and check everything that a search is given; `settings` are those of `SearchProblem.of`."""
    check_module(model)
    samples = proxy_of(model, data, count=count, inputs=inputs, targets=targets, seed=seed)
    return SearchProblem.of(model, samples, budget, target=_target(target), seed=seed, **settings)


def method_of(method: str | SearchMethod) -> SearchMethod:
    """Return the method of that name with its default settings, or the one given. Raises BitscapeError for unknown names."""
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise BitscapeError(f"method={method!r}: unknown{nearest(method, METHODS)}; use one of {', '.join(METHODS)}")
    return METHODS[method]()


def samples_for(method: SearchMethod) -> int:
    """Return how many samples a method is given by default: all that its `images` ask for, and `SAMPLES` at least."""
    return max(SAMPLES, getattr(method, "images", 0))


def check_request(
    method: SearchMethod,
    budget: BudgetText,
    *,
    candidates: Sequence[LayerBits] | None,
    target: str | Target | None,
    latency: LatencyTable | None,
    pick: Pick = "best",
    refine: int = 0,
    for_training: bool = False,
    folder: str | os.PathLike[str] | None = None,
) -> None:
    """Raise BitscapeError for what no network and no data could make a search of."""
    drop, caps = split_drop(budget)
    _check_refine(refine, for_drop=drop is not None, for_training=for_training)
    _check_options(method, pick, folder, for_drop=drop is not None, refine=refine)
    if caps or drop is None:
        check_form(caps or budget, has_latency=latency is not None)
    offered_pairs(candidates, _target(target))
    if latency is not None and latency.coarseness != 1.0 and (for_training or name_of(method) not in COARSE):
        raise BitscapeError(
            f"latency: it is of weights at coarseness {latency.coarseness:g}, which fisher alone scores, without "
            "for_training; use method='fisher', or a table of coarseness 1"
        )


def _check_refine(refine: int, *, for_drop: bool, for_training: bool) -> None:
    if refine < 0:
        raise BitscapeError(f"refine={refine}: it counts policies that are measured; allowed are whole numbers from 0")
    if refine and for_drop:
        raise BitscapeError(f"refine={refine}: a budget of drop=... measures policies by itself; leave refine out")
    if refine and for_training:
        raise BitscapeError(
            f"refine={refine}: it measures networks that are repaired, which training would change; "
            "leave it out, or for_training"
        )


def _check_options(
    method: SearchMethod, pick: Pick, folder: str | os.PathLike[str] | None, *, for_drop: bool, refine: int
) -> None:
    """Raise BitscapeError for what is asked for and the method, or a search for a drop, cannot do."""
    check_pick(pick)
    name = name_of(method)
    if for_drop:
        check_scores(method)
        if pick != "best":
            raise BitscapeError(
                f"pick={pick!r}: a budget of drop=... measures the policies, and the smallest good enough is kept; leave pick out"
            )
        return
    if pick != "best" and "pick" not in method.options:
        raise BitscapeError(
            f"pick={pick!r}: {name} has no scores, so there are no near-equal policies to pick from; "
            "use pick='best', or a method with scores, such as fisher"
        )
    if folder is not None and not refine and "folder" not in method.options:
        raise BitscapeError(
            f"folder={os.fspath(folder)!r}: {name} does not train and keeps nothing there; "
            "leave folder out, or use a method that trains, such as differentiable"
        )


def _check_unmeasured(**arguments: Any) -> None:
    """Raise BitscapeError for arguments that only a drop makes use of."""
    if unused := [name for name, value in arguments.items() if value is not None]:
        raise BitscapeError(
            f"{unused[0]}: a budget of caps is met without measuring; leave {' and '.join(unused)} out and call evaluate "
            "afterwards, or add a drop to the budget, e.g. 'drop=0.5'"
        )


def _target(target: str | Target | None) -> Target | None:
    if not isinstance(target, str):
        return target
    if target not in TARGETS:
        raise BitscapeError(f"target={target!r}: unknown{nearest(target, TARGETS)}; use one of {', '.join(TARGETS)}")
    return TARGETS[target]
