"""What is trained of a quantized network on a few samples without targets."""

from bitscape.tuning.reconstruct import reconstruct
from bitscape.tuning.tune import tune

__all__ = ["reconstruct", "tune"]
