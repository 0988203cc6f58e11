"""How one tensor, then one layer, then one network is quantized."""
