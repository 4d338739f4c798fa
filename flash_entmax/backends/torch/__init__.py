"""Plain PyTorch, tile by tile: for CPU tensors, float64, and any device without Triton."""
