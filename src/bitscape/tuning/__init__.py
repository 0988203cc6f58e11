"""What is trained of a quantized network on a few images without labels."""

from bitscape.tuning.tune import tune

__all__ = ["tune"]
