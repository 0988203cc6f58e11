"""The list of search methods: the command line, the documentation and the tests read this one.

The file of a method is imported when the method is asked for.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol, runtime_checkable

from bitscape.searches.problem import SearchOption, SearchProblem, SearchResult, called


@runtime_checkable
class SearchMethod(Protocol):
    """The settings of a search method, a dataclass."""

    options: ClassVar[frozenset[SearchOption]]
    """What `search` takes beside the problem."""

    def search(self, problem: SearchProblem, *args: Any, **options: Any) -> SearchResult:
        """Find a policy within the problem's budget."""


class Methods(Mapping[str, type[SearchMethod]]):
    """Name on the command line -> settings class of the method."""

    def __init__(self, *classes: str) -> None:
        self._classes = {called(place.rpartition(".")[2]): place for place in classes}
        """Name -> file of this package and class."""

    def __getitem__(self, name: str) -> type[SearchMethod]:
        """Import the method of that name."""
        file, _, kind = self._classes[name].rpartition(".")
        found: type[SearchMethod] = getattr(import_module(f"bitscape.searches.{file}"), kind)
        return found

    def __iter__(self) -> Iterator[str]:
        """Go through the names, without an import."""
        return iter(self._classes)

    def __len__(self) -> int:
        """Count the methods."""
        return len(self._classes)


METHODS = Methods(
    "fisher.Fisher",
    "differentiable.Differentiable",
    "seam.Seam",
    "asga.Asga",
    "trained_scores.TrainedScores",
    "local.Local",
    "kl.Kl",
    "hawq.Hawq",
    "topological.Topological",
    "uniform.Uniform",
    "random_policy.Random",
)
