"""Uniform: the same bits in every layer, the control that any search must beat.

Paper     none
Idea      The largest width that fits the budget, everywhere. With `mix`, two neighbouring widths fill what is left.
Computes  width ladder -> widths; largest that fits -> search; two widths -> mixed
Departs   nothing
Costs     no forward passes; milliseconds.
Measured  docs/results: ptq-imagenet, qat-cifar10.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bitscape.cost.policy_cost import CAPS
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.allocation import Choices, choices
from bitscape.searches.problem import SearchProblem, SearchResult
from bitscape.searches.programme import Choice


def widths(candidates: Sequence[LayerBits], kinds: Sequence[str]) -> list[int]:
    """Return the columns of the uniform candidates, narrowest first.

    If a capped kind of cost depends on both widths, weights and activations have the same one. If caps depend on one of the two
    alone, the other takes the largest that the candidates offer beside it.
    """
    depends_on = {width for kind in kinds for width in CAPS[kind].depends_on}
    if any(len(CAPS[kind].depends_on) == 2 for kind in kinds):
        columns = [at for at, bits in enumerate(candidates) if bits.weight == bits.activation]
        if not columns:
            raise BitscapeError("candidates: none has equal weight and activation bits, as uniform policies do; add e.g. LayerBits(4, 4)")
        return sorted(columns, key=lambda at: candidates[at])
    capped, free = ("weight", "activation") if "weight" in depends_on else ("activation", "weight")
    best: dict[int, int] = {}
    for at in sorted(range(len(candidates)), key=lambda at: getattr(candidates[at], free)):
        best[getattr(candidates[at], capped)] = at
    return [best[width] for width in sorted(best)]


def ladder(stated: Choices) -> list[int]:
    """Return the columns to try, narrowest first.

    With caps on weights and on activations apart, activations take the widest that fits beside the narrowest weights.
    """
    kinds = list(stated.budget.caps)
    apart = {frozenset(CAPS[kind].depends_on) for kind in kinds} == {frozenset({"weight"}), frozenset({"activation"})}
    if not apart:
        return widths(stated.candidates, kinds)
    groups, least = len(stated.freedom.groups), min(bits.weight for bits in stated.candidates)
    beside = [at for at, bits in enumerate(stated.candidates) if bits.weight == least and stated.holds((at,) * groups)]
    widest = max((stated.candidates[at].activation for at in beside), default=min(bits.activation for bits in stated.candidates))
    columns = [at for at, bits in enumerate(stated.candidates) if bits.activation == widest]
    return sorted(columns, key=lambda at: stated.candidates[at])


def mixed(stated: Choices, low: int, high: int) -> Choice:
    """Give the groups with the most MACs `low`, the others `high`: as few `low` as the budget allows (all must fit)."""
    macs = [sum(stated.network.by_name[name].macs for name in group) for group in stated.freedom.groups]
    choice = [high] * len(macs)
    for group in sorted(range(len(macs)), key=lambda at: -macs[at]):
        if stated.holds(tuple(choice)):
            break
        choice[group] = low
    return tuple(choice)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """The largest uniform width that fits; pinned layers keep their bits."""

    mix: bool = False
    """Fill the budget with the next larger width too: the layers with the most MACs get the lower one first."""

    def search(self, problem: SearchProblem) -> SearchResult:
        """Return the uniform policy. Raises InfeasibleBudget, or BitscapeError if only other policies fit."""
        start = time.monotonic()
        stated = choices(problem.network, problem.parsed_budget, problem.candidates, problem.pinned_layers, problem.tied)
        groups = len(stated.freedom.groups)
        columns = ladder(stated)
        fitting = [at for at, column in enumerate(columns) if stated.holds((column,) * groups)]
        if not fitting:
            self._refuse(stated, columns[0])
        low, high = columns[fitting[-1]], columns[min(fitting[-1] + 1, len(columns) - 1)]
        choice = mixed(stated, low, high) if self.mix else (low,) * groups
        trace = tuple({"bits": str(problem.candidates[column]), "fits": at in fitting} for at, column in enumerate(columns))
        policy = stated.policy(choice, problem.provenance(self))
        return SearchResult(policy, None, trace, time.monotonic() - start)

    def _refuse(self, stated: Choices, narrowest: int) -> None:
        stated.first_feasible()
        cost = stated.policy((narrowest,) * len(stated.freedom.groups), {}).cost
        shown = ", ".join(f"{kind}={cost[kind]!r} (cap {most!r})" for kind, most in stated.budget.caps.items())
        raise BitscapeError(
            f"budget: even the narrowest uniform policy, {stated.candidates[narrowest]}, costs {shown}; "
            "a policy that is not uniform fits: use another method, or raise the budget"
        )
