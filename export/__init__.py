"""The way out of PyTorch: ONNX graph, parity with PyTorch, the bundle."""
