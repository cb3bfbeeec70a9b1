"""TensorRT plugins, one module per operator: its kernel, its plugin and its reference. Empty so far: the ONNX Runtime target needs none."""
