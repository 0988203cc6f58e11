"""What is trained of a quantized network on a few samples without targets."""
