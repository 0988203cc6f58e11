"""Fast forms of what `quant/reference.py` defines."""
