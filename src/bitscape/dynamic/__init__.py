"""Bits chosen for each image: features, heads, the dynamic network, the step that trains it, and the static tiers that stand for it."""

from bitscape.dynamic.budget import begin_at, keep_bitops
from bitscape.dynamic.build import dynamic_network
from bitscape.dynamic.decision import Decision
from bitscape.dynamic.dqmq import Dqmq, DqmqSgd
from bitscape.dynamic.network import DynamicBits, DynamicNetwork, decide
from bitscape.dynamic.tiers import TieredNetwork, distill_tiers

__all__ = [
    "Decision",
    "Dqmq",
    "DqmqSgd",
    "DynamicBits",
    "DynamicNetwork",
    "TieredNetwork",
    "begin_at",
    "decide",
    "distill_tiers",
    "dynamic_network",
    "keep_bitops",
]
