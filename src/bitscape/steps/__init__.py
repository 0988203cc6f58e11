"""Step functions for `bitscape.engine.train`, and the loss they share."""

from bitscape.steps.loss import Loss
from bitscape.steps.plain import Plain
from bitscape.steps.sam import Sam, SharpSettings
from bitscape.steps.saq import Saq

STEPS: dict[str, type[Plain] | type[SharpSettings]] = {"plain": Plain, "sam": Sam, "saq": Saq}
"""Word of the command line -> settings of the step."""

__all__ = ["STEPS", "Loss", "Plain", "Sam", "Saq", "SharpSettings"]
