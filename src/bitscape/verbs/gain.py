"""bs.gain: the most that mixed bits can win on a network at a budget, before any search."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from bitscape.cost.budget import BudgetText
from bitscape.cost.targets import Target
from bitscape.engine.task import Task, TaskName
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.fisher import Fisher
from bitscape.searches.freedom import Pins
from bitscape.searches.gain import Gain, gain_of
from bitscape.signatures import checked
from bitscape.verbs.search import search_problem


@checked
def gain(
    model: nn.Module,
    data: Any,
    budget: BudgetText,
    *,
    task: TaskName | Literal["auto"] | Task = "auto",
    count: int = 64,
    candidates: Sequence[LayerBits] | None = None,
    pinned: Mapping[str, LayerBits | str] | Pins | None = None,
    keep_float: Sequence[str | type[nn.Module]] = (),
    tied: Sequence[Sequence[str]] = (),
    target: str | Target | None = None,
    inputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Gain:
    """Return how many bits more a uniform policy would need to be as good as the best mixed one.

    A bound: whole bits win less. It comes from the spread of fisher's scores, which one pass over a few samples gives.

    Args:
        model: float network; it is not changed.
        data: samples, preprocessed for the network; see `search`.
        budget: caps on bytes, BitOps or mean bits; see `search`.
        task: what the outputs are; see `search`.
        count: most samples that are used.
        candidates: pairs of bits that a layer may get.
        pinned: layers with fixed bits.
        keep_float: layers that stay float.
        tied: groups of layers that must get the same bits.
        target: what the network will run on. See `search` for these five.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        seed: of everything random.

    Raises:
        InfeasibleBudget: no policy meets the budget.
        BitscapeError: an argument that cannot be used, or a budget without a cap that adds up over layers.
    """
    problem = search_problem(
        model,
        data,
        budget,
        count=count,
        inputs=inputs,
        targets=None,
        candidates=candidates,
        pinned=pinned,
        keep_float=keep_float,
        tied=tied,
        target=target,
        task=task,
        seed=seed,
    )
    problem.choices.check_feasible()
    bound = gain_of(Fisher(images=count).score(problem), problem.choices) if problem.free_layers else Gain(0.0, None, None)
    if bound is None:
        raise BitscapeError(f"budget: {budget!r} caps no bytes, BitOps or mean bits, of which alone the gain is known; add e.g. '4bit'")
    return bound
