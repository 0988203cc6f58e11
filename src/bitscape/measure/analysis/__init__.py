"""Which layers of a quantized network hurt it, and why: noise, ranges, and the error of each layer alone."""
