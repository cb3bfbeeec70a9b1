"""Everything for NVIDIA GPUs: operators as Triton kernels and TensorRT plugins in Python, the CUDA driver, and the TensorRT targets.

Importing this package loads neither TensorRT, Triton nor PyTorch.
"""
