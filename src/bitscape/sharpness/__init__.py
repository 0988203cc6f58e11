"""Sharpness: how much the loss rises within a small ball around the weights; the ascent, the second pass, and measures of it."""

from bitscape.sharpness.ball import Ascent, Ball
from bitscape.sharpness.curvature import Eigenvalue, top_eigenvalue
from bitscape.sharpness.landscape import LossSlice, loss_slice
from bitscape.sharpness.passes import random_state, repeating
from bitscape.sharpness.probe import BatchLoss, Sharpness, probe_sharpness

__all__ = [
    "Ascent",
    "Ball",
    "BatchLoss",
    "Eigenvalue",
    "LossSlice",
    "Sharpness",
    "loss_slice",
    "probe_sharpness",
    "random_state",
    "repeating",
    "top_eigenvalue",
]
