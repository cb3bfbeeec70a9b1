"""Operators for TensorRT, without C++: Triton kernels, TensorRT plugins in Python, and what binds them.

Importing this package loads neither TensorRT, Triton nor PyTorch.
"""
