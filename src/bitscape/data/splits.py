"""Names of splits, and which split is meant where nobody named one."""

import logging
from collections.abc import Collection

from bitscape.errors import BitscapeError, nearest

_log = logging.getLogger("bitscape.data")
Split = str | tuple[str, ...]
"""A split that must be there, or names of which the first that is there is meant."""
TRAINING = ("train", "training")
EVALUATION = ("test", "testing", "val", "valid", "validation")
NAMES = frozenset({*TRAINING, *EVALUATION})


def are_splits(names: Collection[str]) -> bool:
    """Whether folders of these names are splits, not classes: all are called so, or one is for training and one for evaluation."""
    lower = {name.lower() for name in names}
    return bool(lower) and (lower <= NAMES or (not lower.isdisjoint(TRAINING) and not lower.isdisjoint(EVALUATION)))


def choose(split: Split, available: Collection[str], where: object) -> str:
    """Return the name of a split as `available` has it; a default other than the first is logged. Raises BitscapeError if there is none."""
    wanted = (split,) if isinstance(split, str) else split
    by_lower = {name.lower(): name for name in available}
    chosen = next((by_lower[name.lower()] for name in wanted if name.lower() in by_lower), None)
    if chosen is None:
        hint = nearest(wanted[0], available)
        raise BitscapeError(f"{where}: no split {wanted[0]!r}{hint}; there are {', '.join(sorted(available))}")
    if chosen.lower() != wanted[0]:
        log_default(split, chosen, where)
    return chosen


def log_default(split: Split, chosen: str, where: object) -> None:
    """Say which split is used where nobody named one."""
    if not isinstance(split, str):
        _log.info("%s: using its split %r", where, chosen)
