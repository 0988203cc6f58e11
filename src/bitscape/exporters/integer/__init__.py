"""A quantized network in integer form: the graph that the exporters start from."""
