"""Random: random bits at equal budget, the second control that any search must beat.

Paper     none
Idea      Every layer gets a random candidate; random single-layer moves then lead to just below the cap. Many seeds
          show how much of a method's result is the budget alone.
Computes  one walk -> walk; several starts -> search
Departs   nothing
Costs     no forward passes; milliseconds to a second.
Measured  docs/results: ptq-imagenet, qat-cifar10.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bitscape.errors import BitscapeError
from bitscape.searches.choices import Choices
from bitscape.searches.knapsack import CapRow, reachable
from bitscape.searches.problem import SearchOption, SearchProblem, SearchResult
from bitscape.searches.programme import Allowed, Choice

_log = logging.getLogger("bitscape.searches")

MOVES_PER_GROUP = 200
LARGEST_SHORTFALL = 0.05


def usage(stated: Choices, choice: Choice) -> float:
    """Return the share of the tightest cap that a choice uses; 1.0 is exactly the cap.

    A peak cap binds as soon as one layer reaches it: it is kept, but tells of use only where no cap adds up over layers.
    """
    row = _tightest(stated, choice)
    return row.total(choice) / row.limit


def walk(stated: Choices, start: Choice, allowed: Allowed, window: float, rng: np.random.Generator) -> Choice:
    """Move single layers, at random, from `start` to within `window` below the tightest cap, or until moves run out.

    Above a cap a random layer takes a random pair that costs less under the tightest cap, below the window one that
    costs more; a move that ends further from the window is not made.
    """
    choice, distance = start, _distance(usage(stated, start), window)
    for _ in range(MOVES_PER_GROUP * len(start)):
        if distance == 0.0:
            break
        moved = _move(stated, choice, allowed, rng)
        moved_distance = _distance(usage(stated, moved), window)
        if moved_distance <= distance:
            choice, distance = moved, moved_distance
    return choice


@dataclass(frozen=True, kw_only=True)
class Random:
    """A random policy just below the tightest cap and within all of them; the problem's seed decides which."""

    window: float = 0.02
    """The policy uses at least 1 - window of the tightest cap; if no try gets there, the best one counts from 95 %."""
    tries: int = 20
    """Random starts."""

    options: ClassVar[frozenset[SearchOption]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.window < 1:
            raise BitscapeError(f"window={self.window}; allowed are shares of the cap between 0 and 1, e.g. 0.02")
        if self.tries < 1:
            raise BitscapeError(f"tries={self.tries}; at least 1 is needed")

    def search(self, problem: SearchProblem) -> SearchResult:
        """Return a random policy. Raises InfeasibleBudget, or BitscapeError if none found uses 95 % of a cap."""
        return self.choose(problem.choices, problem.seed, problem.provenance(self))

    def choose(self, stated: Choices, seed: int, provenance: Mapping[str, Any]) -> SearchResult:
        """The same of the choices alone: it needs neither network nor samples."""
        begin = time.monotonic()
        rng = np.random.default_rng(seed)
        best = stated.first_feasible()
        trace = []
        for start, allowed in self._starts(stated, best, rng):
            choice = walk(stated, start, allowed, self.window, rng)
            used = usage(stated, choice)
            trace.append({"start": usage(stated, start), "used": used})
            if stated.holds(choice) and used >= 1 - self.window:
                best = choice
                break
            if stated.holds(choice) and used > usage(stated, best):
                best = choice
        if stated.freedom.groups:
            self._check(usage(stated, best), stated)
        return SearchResult(stated.policy(best, provenance), None, tuple(trace), time.monotonic() - begin, stated)

    def _starts(self, stated: Choices, feasible: Choice, rng: np.random.Generator) -> Iterator[tuple[Choice, Allowed]]:
        allowed = reachable(stated.allowed, stated.caps)
        assert allowed is not None, "a feasible choice exists"
        for _ in range(self.tries):
            yield tuple(int(rng.choice(np.flatnonzero(row))) for row in allowed), allowed
        yield feasible, allowed

    def _check(self, used: float, stated: Choices) -> None:
        names = ", ".join(stated.budget.caps)
        if used < 1 - max(LARGEST_SHORTFALL, self.window):
            raise BitscapeError(
                f"budget: no random policy within {self.window:.0%} below the cap was found; the closest "
                f"uses {used:.1%} of the tightest of {names}; lower the budget, or offer more candidates"
            )
        if used < 1 - self.window:
            asked = 100 * (1 - self.window)
            _log.warning("random policy uses %.1f %% of the tightest of %s; %g %% was asked for", 100 * used, names, asked)


def _distance(used: float, window: float) -> float:
    return max(used - 1.0, 1.0 - window - used, 0.0)


def _tightest(stated: Choices, choice: Choice) -> CapRow:
    additive = [row for row in stated.caps if row.additive]
    return max(additive or stated.caps, key=lambda row: row.total(choice) / row.limit)


def _move(stated: Choices, choice: Choice, allowed: Allowed, rng: np.random.Generator) -> Choice:
    tightest = _tightest(stated, choice)
    group = int(rng.integers(len(choice)))
    costs, now = tightest.costs[group], tightest.costs[group][choice[group]]
    over = not tightest.holds(choice)
    options = [at for at in np.flatnonzero(allowed[group]) if (costs[at] < now if over else costs[at] > now)]
    if not options:
        return choice
    return (*choice[:group], int(rng.choice(options)), *choice[group + 1 :])
