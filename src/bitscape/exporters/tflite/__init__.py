"""LiteRT (TensorFlow Lite) files, and the check that LiteRT computes them as integers say it must."""
