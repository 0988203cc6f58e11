"""bs.search: a float network, a few samples and a budget in; a policy out."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from bitscape.cost.latency import LatencyTable
from bitscape.cost.targets import TARGETS, Target
from bitscape.engine.task import TaskName
from bitscape.errors import BitscapeError, nearest
from bitscape.models.prepare import prepare
from bitscape.policy import LayerBits
from bitscape.searches.methods import METHODS, SearchMethod
from bitscape.searches.problem import DEFAULT_CANDIDATES, Pick, SearchProblem, SearchResult
from bitscape.verbs.proxy import one_tensor, proxy_of


def search(
    model: nn.Module,
    data: Any,
    budget: str | Sequence[str] | Mapping[str, float | str],
    *,
    method: str | SearchMethod = "fisher",
    task: TaskName | Literal["auto"] = "auto",
    count: int = 256,
    candidates: Sequence[LayerBits] = DEFAULT_CANDIDATES,
    pinned: Mapping[str, LayerBits] | None = None,
    tied: Sequence[Sequence[str]] = (),
    target: str | Target | None = None,
    latency: LatencyTable | None = None,
    for_training: bool = False,
    pick: Pick = "best",
    attention_products: bool = False,
    inputs: Callable[[Any], Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> SearchResult:
    """Find the bits of each layer within a budget that is never exceeded.

    Args:
        model: float network; it is not changed.
        data: samples, preprocessed for the network; no labels are needed. A tensor (n, ...), an iterable of batches such as
            a DataLoader, a torch or Hugging Face dataset, or `Batches`.
        budget: one or several caps, e.g. "bitops=0.25x", "weight_bytes=1.2MB" or ["bitops=w4a4", "weight_bytes=w4"].
        method: name of a search method (`bitscape methods` lists them), or its settings, e.g. `Fisher(images=512)`.
        task: what the outputs are: "classes" for logits (n, k), "binary", "follow" for any others; "auto" looks at them.
        count: most samples that are used. Of a dataset they are drawn by `seed`, of an iterable they are the first.
        candidates: pairs of bits that a layer may get.
        pinned: layers with fixed bits; None pins the first and the last at 8/8, {} pins none.
        tied: groups of layers that must get the same bits.
        target: what the network will run on, e.g. "openvino": only bits that it stores and computes are offered.
        latency: measured times of this network, which make `latency_ms` a cap.
        for_training: whether the network will be trained at its bits afterwards.
        pick: "best", or the "least-sharp" of the policies with near-equal scores.
        attention_products: give bits to the two products of attention too ("attn.scores", "attn.values"): `weight` is the
            width of the second operand. Of the methods that measure, fisher and local take them.
        inputs: from a batch to the one tensor that the network is called with; see `BatchReader`.
        targets: from a batch to its labels, which searches that train make use of.
        folder: where a search that trains keeps its checkpoint; the same call goes on from there.
        seed: of everything random.

    Raises:
        InfeasibleBudget: no policy meets the budget; the message says what would.
        BitscapeError: any other argument that cannot be used.
    """
    if attention_products:
        model = prepare(model, attention_products=True)
    images, labels = one_tensor(proxy_of(model, data, count=count, inputs=inputs, targets=targets, seed=seed))
    problem = SearchProblem(
        model=model,
        images=images,
        labels=labels,
        budget=budget,
        # As it came: the default is told from the same pairs given by hand, which a target may refuse.
        candidates=candidates if isinstance(candidates, tuple) else tuple(candidates),
        pinned=pinned,
        tied=tied,
        target=_target(target),
        latency=latency,
        for_training=for_training,
        task=task,
        pick=pick,
        folder=folder,
        seed=seed,
    )
    return _method(method).search(problem)


def _method(method: str | SearchMethod) -> SearchMethod:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise BitscapeError(f"method={method!r}: unknown{nearest(method, METHODS)}; use one of {', '.join(METHODS)}")
    return METHODS[method]()


def _target(target: str | Target | None) -> Target | None:
    if not isinstance(target, str):
        return target
    if target not in TARGETS:
        raise BitscapeError(f"target={target!r}: unknown{nearest(target, TARGETS)}; use one of {', '.join(TARGETS)}")
    return TARGETS[target]
