"""The list of search methods, as a type: the command line, the documentation and the tests read this one line."""

from typing import get_args

from bitscape.search.asga import Asga
from bitscape.search.differentiable import Differentiable
from bitscape.search.fisher import Fisher
from bitscape.search.hawq import Hawq
from bitscape.search.kl import Kl
from bitscape.search.local import Local
from bitscape.search.random_policy import Random
from bitscape.search.seam import Seam
from bitscape.search.topological import Topological
from bitscape.search.uniform import Uniform

SearchMethod = Fisher | Differentiable | Seam | Asga | Local | Kl | Hawq | Topological | Uniform | Random

METHODS: dict[str, type[SearchMethod]] = {kind.__name__.lower(): kind for kind in get_args(SearchMethod)}
"""Name on the command line -> settings class of the method, in the order above."""
