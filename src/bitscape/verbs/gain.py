"""bs.gain: the most that mixed bits can win on a network at a budget, before any search."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bitscape.cost.budget import BudgetText
from bitscape.errors import BitscapeError
from bitscape.searches.fisher import Fisher
from bitscape.searches.gain import Gain, gain_of
from bitscape.verbs.search import search_problem


def gain(
    model: nn.Module,
    data: Any,
    budget: BudgetText,
    *,
    count: int = 64,
    inputs: Callable[[Any], Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Gain:
    """Return how many bits more a uniform policy would need to be as good as the best mixed one.

    A bound: whole bits win less. It comes from the spread of fisher's scores, which one pass over a few samples gives.

    Args:
        model: float network; it is not changed.
        data: samples, preprocessed for the network; see `search`.
        budget: caps on bytes, BitOps or mean bits; see `search`.
        count: most samples that are used.
        inputs: from a batch to what the network is called with; see `BatchReader`.
        seed: of everything random.
        settings: `candidates`, `pinned`, `keep_float`, `tied`, `target` and `task`, as `search` takes them.

    Raises:
        BitscapeError: an argument that cannot be used, or a budget without a cap that adds up over layers.
    """
    problem = search_problem(model, data, budget, count=count, inputs=inputs, targets=None, seed=seed, **settings)
    bound = gain_of(Fisher(images=count).score(problem), problem.choices) if problem.free_layers else Gain(0.0, None, None)
    if bound is None:
        raise BitscapeError(f"budget: {budget!r} caps no bytes, BitOps or mean bits, of which alone the gain is known; add e.g. '4bit'")
    return bound
