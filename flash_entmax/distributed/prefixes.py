"""The first tokens of a sequence, for several numbers of tokens: what the chunks of a causal call may see."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Prefixes(torch.autograd.Function):
    """Their gradients are added in one tensor. Autograd would fill one of the whole length for each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.lengths = tensor.shape, lengths
        return tuple(tensor[:, :, :length] for length in lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        *others, (length, grad) = zip(ctx.lengths, grads, strict=True)
        total = grad.new_empty(ctx.shape)
        total[:, :, :length].copy_(grad)
        total[:, :, length:].zero_()
        for length, grad in others:
            total[:, :, :length].add_(grad)
        return total, None


def prefixes(tensor: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """tensor[:, :, :length] for each length. Views. No length is above the one behind it."""
    if lengths == (tensor.shape[2],):
        return (tensor,)
    return Prefixes.apply(tensor, lengths)
