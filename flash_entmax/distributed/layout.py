"""Which part of a sequence each rank holds.

The sequence is cut into chunks of one length. With the layout "contiguous" there is one chunk for each rank, in order.
With "balanced" there are two: rank r of n ranks has the chunks r and 2 n - 1 - r. So each rank has an early and a late
part of the sequence, and with a causal mask as many pairs of queries and keys as any other rank.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import said
from .ranks import Ranks

Layout = Literal["balanced", "contiguous"]


def chunks(size: int, layout: Layout) -> list[tuple[int, ...]]:
    """The numbers of the chunks of each rank."""
    if layout == "balanced":
        return [(rank, 2 * size - 1 - rank) for rank in range(size)]
    return [(rank,) for rank in range(size)]


def split(whole: Tensor, dim: int, size: int, layout: Layout) -> list[Tensor]:
    """The part of each rank."""
    numbers = chunks(size, layout)
    pieces = whole.chunk(size * len(numbers[0]), dim) if whole.shape[dim] else [whole] * size * len(numbers[0])
    return [torch.cat([pieces[number] for number in own], dim) for own in numbers]


def joined(parts: Tensor, dim: int, layout: Layout) -> Tensor:
    """The whole of the parts of all ranks (ranks, *shape of a part): the inverse of `split`. Without gradient."""
    shape = list(parts.shape[1:])
    shape[dim] *= len(parts)
    whole = parts.new_empty(shape)
    for of_whole, of_part in chunk_pairs(whole, parts, dim, layout):
        of_whole.copy_(of_part)
    return whole


def parted(whole: Tensor, dim: int, size: int, layout: Layout) -> Tensor:
    """(ranks, *shape of a part): the parts of all ranks in one piece. Without gradient."""
    shape = list(whole.shape)
    shape[dim] //= size
    parts = whole.new_empty(size, *shape)
    for of_whole, of_part in chunk_pairs(whole, parts, dim, layout):
        of_part.copy_(of_whole)
    return parts


def chunk_pairs(whole: Tensor, parts: Tensor, dim: int, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk, in the whole and in the part that holds it: views. To copy them takes a quarter of the time of
    `torch.cat`, where heads lie between the chunks (H200)."""
    numbers = chunks(len(parts), layout)
    size = parts.shape[dim + 1] // len(numbers[0])
    for part, own in zip(parts, numbers, strict=True):
        for place, number in enumerate(own):
            yield whole.narrow(dim, number * size, size), part.narrow(dim, place * size, size)


def local_positions(length: int, ranks: Ranks, layout: Layout, device: torch.device | str | None) -> Tensor:
    """(local length,) int64."""
    return split(torch.arange(length, device=device), 0, ranks.size, layout)[ranks.rank]


def check_layout(layout: object) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be {' or '.join(map(repr, get_args(Layout)))}, got {said(layout)}")


def check_length(length: int, size: int, layout: Layout) -> None:
    """The length of a whole sequence."""
    parts = size * len(chunks(size, layout)[0])
    if length % parts:
        pieces = f"{parts} chunks of one length, for {size} ranks and the {layout} layout"
        raise ValueError(
            f"a sequence must divide into {pieces}, got length {length}: pad it to a multiple of {parts}, and hide the "
            "padding with key_lengths"
        )
