"""The front of a search: the best policy at every cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bitscape.plots import new_axes
from bitscape.policy import Policy
from bitscape.tables import Shown, Table, shortened
from bitscape.words import cost_name, cost_text, counted


class FrontPoint(NamedTuple):
    """A policy by what it costs and how it scores."""

    cost: float
    score: float
    """Total over the layers; lower is better."""
    policy: Policy


@dataclass(frozen=True, kw_only=True, repr=False)
class Front(Shown):
    """Policies from the cheapest possible to the best-scored, each the best for its cost, by ascending cost."""

    kind: str
    """Of cost."""
    method: str
    """That scored."""
    policies: tuple[Policy, ...]
    """At least one."""
    chosen: Policy | None = None
    """The policy that a search returned for its budget."""

    @property
    def points(self) -> tuple[FrontPoint, ...]:
        """The policies with their costs and scores."""
        return tuple(self._point(policy) for policy in self.policies)

    def with_chosen(self, policy: Policy) -> "Front":
        """Return the same front, with `policy` marked."""
        return replace(self, chosen=policy)

    def table(self) -> Table:
        """Return costs, scores and mean bits of the first and last policies."""
        rows = [tuple(self._cells(point)) for point in self.points]
        return Table(
            title=f"Front along {self.kind}: {counted(len(rows), 'point')}",
            columns=(self.kind, f"score ({self.method})", "mean weight bits", "mean activation bits"),
            rows=shortened(rows),
            left=0,
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw scores over costs, and the policy that the search returned.

        Args:
            axes: of matplotlib, to draw on; None makes a figure.

        Returns:
            The axes.

        Raises:
            BitscapeError: matplotlib is not installed.
        """
        axes = new_axes(axes)
        axes.plot([p.cost for p in self.points], [p.score for p in self.points], marker="o", label="front")
        if self.chosen is not None:
            chosen = self._point(self.chosen)
            axes.plot([chosen.cost], [chosen.score], marker="*", markersize=14, linestyle="none", label="returned")
        axes.set(xlabel=cost_name(self.kind), ylabel=f"score ({self.method}), lower is better", xscale="log")
        if min(point.score for point in self.points) > 0:
            axes.set_yscale("log")
        axes.legend()
        return axes

    def _point(self, policy: Policy) -> FrontPoint:
        return FrontPoint(policy.cost[self.kind], policy.provenance["score"], policy)

    def _cells(self, point: FrontPoint) -> Iterator[str]:
        yield cost_text(self.kind, point.cost)
        yield f"{point.score:.4g}"
        for kind in ("mean_weight_bits", "mean_activation_bits"):
            yield f"{point.policy.cost[kind]:.3f}"
