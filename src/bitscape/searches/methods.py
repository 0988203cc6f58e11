"""The list of search methods, as a type: the command line, the documentation and the tests read this one line."""

from typing import get_args

from bitscape.searches.asga import Asga
from bitscape.searches.differentiable import Differentiable
from bitscape.searches.fisher import Fisher
from bitscape.searches.hawq import Hawq
from bitscape.searches.kl import Kl
from bitscape.searches.local import Local
from bitscape.searches.random_policy import Random
from bitscape.searches.seam import Seam
from bitscape.searches.topological import Topological
from bitscape.searches.uniform import Uniform

SearchMethod = Fisher | Differentiable | Seam | Asga | Local | Kl | Hawq | Topological | Uniform | Random

METHODS: dict[str, type[SearchMethod]] = {kind.__name__.lower(): kind for kind in get_args(SearchMethod)}
"""Name on the command line -> settings class of the method, in the order above."""
