"""Step functions for `bitscape.engine.train`, and the loss they share."""

from bitscape.train.loss import Loss
from bitscape.train.plain import Plain
from bitscape.train.sam import Sam
from bitscape.train.saq import Saq

STEPS: dict[str, type[Plain] | type[Sam]] = {"plain": Plain, "sam": Sam, "saq": Saq}
"""Word of the command line -> settings of the step."""

__all__ = ["STEPS", "Loss", "Plain", "Sam", "Saq"]
