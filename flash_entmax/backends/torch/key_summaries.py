"""Keys in 8 bits, in plain PyTorch."""

import torch
from torch import Tensor

from ...core.call import (
    LARGEST_ROUNDED,
    NORM_ROUNDING,
    SMALLEST_ROUNDED,
    SUMMARY_BLOCK,
    RoundedKeys,
    rounding_share,
)
from ...core.tensors import ceil_div


def append_keys(rounded_keys: RoundedKeys, key: Tensor, lengths: Tensor) -> None:
    """See backends.Backend."""
    capacity, size = rounded_keys.rounded.shape[2:]
    if not (key.numel() and capacity):
        return
    padded = torch.nn.functional.pad(key.float(), (0, size - key.shape[3]))
    numbers, unit, error = rounded_of(padded)
    position = lengths.long().unsqueeze(1) + torch.arange(key.shape[2], device=key.device)
    inside = (position >= 0) & (position < capacity)
    row, new = inside.nonzero(as_tuple=True)
    place = position[row, new]
    rounded_keys.rounded[row, :, place] = numbers[row, :, new]
    rounded_keys.unit[row, :, place] = unit[row, :, new]
    block = (position.clamp(0, capacity - 1) // SUMMARY_BLOCK).unsqueeze(1).expand_as(error)
    rounded_keys.error.scatter_reduce_(2, block, torch.where(inside.unsqueeze(1), error, 0.0), "amax")
    if rounded_keys.centre is not None:
        store_bounds(rounded_keys, lengths.long(), key.shape[2])


def store_bounds(rounded_keys: RoundedKeys, lengths: Tensor, new: int) -> None:
    """The bounds of the blocks of so many new keys, from positions `lengths` on; inf where one is not full."""
    rounded, unit, error, centre, radius, centre_error = rounded_keys
    capacity, slots = rounded.shape[2], ceil_div(new - 1, SUMMARY_BLOCK) + 1
    blocks = lengths.unsqueeze(1) // SUMMARY_BLOCK + torch.arange(slots, device=lengths.device)
    row, slot = ((blocks >= 0) & (blocks < radius.shape[2])).nonzero(as_tuple=True)
    block = blocks[row, slot]
    end = (block + 1) * SUMMARY_BLOCK
    place = block.unsqueeze(1) * SUMMARY_BLOCK + torch.arange(SUMMARY_BLOCK, device=lengths.device)
    rows, place = row.unsqueeze(1), place.clamp_max(capacity - 1)
    x = (rounded[rows, :, place] * unit[rows, :, place].unsqueeze(-1)).transpose(1, 2)  # (blocks, heads, keys, size)
    mean = x.mean(2)
    c = mean.to(centre.dtype)
    away, missed = norm(x - c.float().unsqueeze(2)).amax(-1), norm(mean - c.float())
    spare = error[row, :, block] + 2.0 * rounding_share(x.shape[-1]) * (norm(c.float()) + away)
    is_full = ((end <= lengths[row] + new) & (end <= capacity)).unsqueeze(1) & ~mean.isnan().any(-1)
    centre[row, :, block] = torch.where(is_full.unsqueeze(-1), c, 0.0)
    radius[row, :, block] = torch.where(is_full, (away + spare) * NORM_ROUNDING, torch.inf)
    centre_error[row, :, block] = torch.where(is_full, (missed + spare) * NORM_ROUNDING, torch.inf)


def rounded_of(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rounded, unit, error) of keys (..., size) in float32: unit * rounded stands for a key."""
    largest = k.abs().amax(-1, keepdim=True)
    is_finite = largest < torch.inf
    k, largest = torch.where(is_finite, k, 0.0), torch.where(is_finite, largest, 0.0)
    is_rounded = largest >= SMALLEST_ROUNDED
    unit = torch.where(is_rounded, largest * (1.0 / LARGEST_ROUNDED), 0.0)
    inverse = largest.new_full((), LARGEST_ROUNDED) / largest  # not as a number: PyTorch would round its quotient twice
    numbers = torch.floor(k * torch.where(is_rounded, inverse, 0.0) + 0.5)
    error = (norm(k - unit * numbers) + rounding_share(k.shape[-1]) * norm(k)) * NORM_ROUNDING
    return numbers.to(torch.int8), torch.where(is_finite, unit, torch.nan).squeeze(-1), error


def norm(x: Tensor) -> Tensor:
    """Euclidean lengths along the last dimension. No square under- or overflows."""
    largest = x.abs().amax(-1, keepdim=True)
    ratio = x / torch.where(largest > 0, largest, 1.0)
    return (largest * (ratio * ratio).sum(-1, keepdim=True).sqrt()).squeeze(-1)
