"""Packed files: a quantized network as one safetensors file, read back bit for bit."""
