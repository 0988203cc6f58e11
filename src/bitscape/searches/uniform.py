"""Uniform: the same bits in every layer, the control that any search must beat.

Paper     none
Idea      The largest width that fits the budget, everywhere. With `mix`, two neighbouring widths fill what is left.
Computes  width ladder -> uniform_columns; largest that fits -> search; two widths -> mixed
Departs   nothing
Costs     no forward passes; milliseconds.
Measured  docs/results: ptq-imagenet, qat-cifar10.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bitscape.cost.policy_cost import CAPS
from bitscape.errors import BitscapeError
from bitscape.policy import LayerBits
from bitscape.searches.choices import Choices
from bitscape.searches.problem import SearchOption, SearchProblem, SearchResult
from bitscape.searches.programme import Choice


def uniform_columns(candidates: Sequence[LayerBits], kinds: Sequence[str]) -> list[int]:
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
        return uniform_columns(stated.candidates, kinds)
    least = min(bits.weight for bits in stated.candidates)
    beside = [at for at, bits in enumerate(stated.candidates) if bits.weight == least and stated.holds(stated.uniform(at))]
    widest = max((stated.candidates[at].activation for at in beside), default=min(bits.activation for bits in stated.candidates))
    columns = [at for at, bits in enumerate(stated.candidates) if bits.activation == widest]
    return sorted(columns, key=lambda at: stated.candidates[at])


def mixed(stated: Choices, low: int, high: int) -> Choice:
    """Give the groups with the most MACs `low`, the others `high`: as few `low` as the budget allows (all must fit)."""
    macs = [sum(stated.network.by_name[name].macs for name in group) for group in stated.freedom.groups]
    narrow, choice = stated.uniform(low), list(stated.uniform(high))
    for group in sorted(range(len(macs)), key=lambda at: -macs[at]):
        if stated.holds(tuple(choice)):
            break
        choice[group] = narrow[group]
    return tuple(choice)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """The largest uniform width that fits; pinned layers keep their bits.

    Under a cap on weights alone, the weights of the first layer, which are pinned by default, take the uniform width where all
    layers may then have a larger one: "4bit" is met by 4 bits in every layer.
    """

    mix: bool = False
    """Fill the budget with the next larger width too: the layers with the most MACs get the lower one first."""

    options: ClassVar[frozenset[SearchOption]] = frozenset()

    def search(self, problem: SearchProblem) -> SearchResult:
        """Return the uniform policy. Raises InfeasibleBudget, or BitscapeError if only other policies fit."""
        return self.choose(problem.choices, problem.provenance(self))

    def choose(self, choices: Choices, provenance: Mapping[str, Any]) -> SearchResult:
        """The same of the choices alone: it needs neither network nor samples."""
        start = time.monotonic()
        columns = ladder(choices)
        fitting = self._fitting(choices, columns)
        if len(self._fitting(choices.with_first_free, columns)) > len(fitting):
            choices = choices.with_first_free
            fitting = self._fitting(choices, columns)
            provenance = {**provenance, **choices.provenance()}
        if not fitting:
            self._refuse(choices, columns[0])
        low, high = columns[fitting[-1]], columns[min(fitting[-1] + 1, len(columns) - 1)]
        choice = mixed(choices, low, high) if self.mix else choices.uniform(low)
        trace = tuple({"bits": str(choices.candidates[column]), "fits": at in fitting} for at, column in enumerate(columns))
        return SearchResult(choices.policy(choice, provenance), None, trace, time.monotonic() - start, choices)

    def _fitting(self, choices: Choices, columns: Sequence[int]) -> list[int]:
        return [at for at, column in enumerate(columns) if choices.holds(choices.uniform(column))]

    def _refuse(self, choices: Choices, narrowest: int) -> None:
        choices.check_feasible()
        cost = choices.policy(choices.uniform(narrowest), {}).cost
        shown = ", ".join(f"{kind}={cost[kind]!r} (cap {most!r})" for kind, most in choices.budget.caps.items())
        raise BitscapeError(
            f"budget: even the narrowest uniform policy, {choices.candidates[narrowest]}, costs {shown}; "
            "a policy that is not uniform fits: use another method, or raise the budget"
        )
