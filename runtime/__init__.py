"""Runs an exported DynaMask: bundles, engines, images, video, validation. Needs neither PyTorch nor the training code."""
