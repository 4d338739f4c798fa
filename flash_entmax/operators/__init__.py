"""The operators that PyTorch sees: schemas, shapes for tracing, autograd, torch.vmap, FLOPs."""
