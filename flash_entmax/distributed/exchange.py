"""What the ranks of a group exchange, with gradients.

A sum over ranks is an exchange of all parts, and one addition of them on each rank, always in the same order. So
repeated runs agree bit for bit, and so do the ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from .layout import Layout, joined, parted
from .ranks import Ranks, all_gather

collectives = torch.ops._c10d_functional


class Arriving(NamedTuple):
    """The parts of all ranks, (ranks, *shape of a part), while they travel."""

    parts: Tensor
    wait: Callable[[], object]


def start_gathering(part: Tensor, ranks: Ranks) -> Arriving:
    """Send this rank's part to all ranks; the call does not wait."""
    part = part.detach().contiguous()
    parts = part.new_empty(ranks.size, *part.shape)
    if not part.numel():
        return Arriving(parts, lambda: None)
    # As bytes: the collectives do not know every dtype, and nothing is added up.
    sent, received = (tensor.flatten().view(torch.uint8) for tensor in (part, parts))
    return Arriving(parts, all_gather(received, sent, group=ranks.group, async_op=True).wait)


def gathered(part: Tensor, ranks: Ranks) -> Tensor:
    """(ranks, *shape): the parts of all ranks, without gradient."""
    if torch.compiler.is_compiling():
        return gathered_in_graph(part.detach(), ranks)
    arriving = start_gathering(part, ranks)
    arriving.wait()
    return arriving.parts


def exchanged(parts: Tensor, ranks: Ranks) -> Tensor:
    """(ranks, *shape), one part for each rank -> (ranks, *shape), one part from each rank."""
    parts = parts.contiguous()
    if not parts.numel():
        return parts
    if torch.compiler.is_compiling():
        return exchanged_in_graph(parts, ranks)
    received = torch.empty_like(parts)
    distributed.all_to_all_single(received, parts, group=ranks.group)
    return received


# In a graph of torch.compile, the collectives are operators of PyTorch: Inductor keeps their order, which must be the
# same on all ranks, and moves other operators around them.


def gathered_in_graph(part: Tensor, ranks: Ranks) -> Tensor:
    if not part.numel():
        return part.new_empty(ranks.size, *part.shape)
    sent = part.contiguous().flatten().view(torch.uint8)
    parts = collectives.all_gather_into_tensor(sent, ranks.size, ranks.group.group_name)
    return collectives.wait_tensor(parts).view(part.dtype).view(ranks.size, *part.shape)


def exchanged_in_graph(parts: Tensor, ranks: Ranks) -> Tensor:
    sizes = [parts.numel() // ranks.size] * ranks.size
    received = collectives.all_to_all_single(parts.flatten(), sizes, sizes, ranks.group.group_name)
    return collectives.wait_tensor(received).view(parts.shape)


def summed(parts: Tensor) -> Tensor:
    """The sum over dimension 0, the ranks: of 16-bit types in float32, rounded once."""
    return parts.sum(0)


class Gather(torch.autograd.Function):
    """The whole sequence of the ranks' parts; a part's gradient is the sum of what the whole gets on each rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, arriving: Arriving | None, dim: int, ranks: Ranks, layout: Layout) -> Tensor:
        ctx.of = dim, ranks, layout
        if arriving is None:
            return joined(gathered(part, ranks), dim, layout)
        arriving.wait()
        return joined(arriving.parts, dim, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_whole: Tensor) -> tuple:
        dim, ranks, layout = ctx.of
        parts = parted(grad_whole, dim, ranks.size, layout)
        return summed(exchanged(parts, ranks)), None, None, None, None


def gather(part: Tensor, dim: int, ranks: Ranks, layout: Layout, arriving: Arriving | None = None) -> Tensor:
    """The whole sequence along a dimension, of parts that may be on their way."""
    return Gather.apply(part, arriving, dim, ranks, layout)


class Exchange(torch.autograd.Function):
    """(batch, heads, length, dim): all heads of a part of the sequence <-> some heads of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_heads: bool, ranks: Ranks, layout: Layout) -> Tensor:
        ctx.of = to_heads, ranks, layout
        return moved(tensor, to_heads, ranks, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        to_heads, ranks, layout = ctx.of
        return moved(grad, not to_heads, ranks, layout), None, None, None


def moved(tensor: Tensor, to_heads: bool, ranks: Ranks, layout: Layout) -> Tensor:
    if to_heads:
        parts = tensor.unflatten(1, (ranks.size, tensor.shape[1] // ranks.size)).movedim(1, 0)
        return joined(exchanged(parts, ranks), 2, layout)
    parts = parted(tensor, 2, ranks.size, layout)
    return exchanged(parts, ranks).movedim(0, 1).flatten(1, 2)


class SumGradients(torch.autograd.Function):
    """A parameter that all ranks have; its gradient is the sum of those of the ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return summed(gathered(grad, ctx.ranks)), None


def sum_gradients(parameter: Any, ranks: Ranks) -> Any:
    """The parameter, if it is a tensor that learns, with a gradient that is summed over ranks."""
    learns = isinstance(parameter, Tensor) and parameter.requires_grad and torch.is_grad_enabled()
    return SumGradients.apply(parameter, ranks) if learns else parameter
