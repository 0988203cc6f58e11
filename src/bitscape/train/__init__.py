"""Step functions for `bitscape.engine.train`, and the loss they share."""

from bitscape.train.loss import Loss
from bitscape.train.plain import Plain

__all__ = ["Loss", "Plain"]
