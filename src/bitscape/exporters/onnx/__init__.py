"""ONNX files: for integer runtimes, and QONNX for tools that build hardware."""
