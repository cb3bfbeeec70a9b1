"""Exports a model from PyTorch to ONNX, compares the two, and builds bundles and engines."""
