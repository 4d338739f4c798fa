"""What computes a call: the specification, softmax, plain PyTorch, and Triton."""
