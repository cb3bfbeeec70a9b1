"""`python -m benchmarks.training_step`: a training step beside one of torchvision's Mask R-CNN."""
