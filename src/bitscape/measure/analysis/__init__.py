"""Which layers of a quantized network hurt it, and why: noise, ranges, the error of each alone."""
