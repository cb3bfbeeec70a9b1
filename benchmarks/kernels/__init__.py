"""`python -m benchmarks.kernels`: the GPU kernels beside torchvision's operators, and inside the mask branch."""
