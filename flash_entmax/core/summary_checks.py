"""Every refusal of KeySummaries, and of a call that is given a summary of its keys; see checks.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from .call import MAX_HEAD_SIZE, MOST_DECODED, KeySummary
from .checks import DTYPES, check_index, is_int, require_dense, typed
from .tensors import ceil_div

SUMMARY_DTYPES = DTYPES[:3]
MOST_KEYS = 2**30  # of a cache


def check_key_summary(summary: object, key: Tensor, tile: int | None) -> None:
    """A summary of these keys, in blocks of `tile` keys, or of any size where no tile is known."""
    if not isinstance(summary, KeySummary):
        wanted = "what summarise_keys returns, or KeySummaries"
        raise TypeError(f"key_summary must be {wanted}, got {type(summary).__name__}")
    count = summary.radius.shape[-1] if tile is None and isinstance(summary.radius, Tensor) else 0
    if tile is not None:
        count = ceil_div(key.shape[2], tile)
    blocks = *key.shape[:2], count
    for name, tensor in summary._asdict().items():
        shape, dtype = ((*blocks, key.shape[3]), key.dtype) if name == "centre" else (blocks, torch.float32)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"key_summary.{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            keys = f"these keys, in blocks of {tile}" if tile else "these keys"
            raise ValueError(f"key_summary.{name} must be of {keys}: of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"key_summary.{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != key.device:
            raise ValueError(f"key_summary.{name} must be on the device of the keys, {key.device}, got {tensor.device}")


def check_decoded(query: Tensor, needs_backward: bool) -> None:
    """KeySummaries are for decoding: what else a call may ask for, they have no use for."""
    if needs_backward:
        raise ValueError(
            "key_summary=KeySummaries is for calls without gradients, torch.func and return_support: call under "
            "torch.no_grad(), or leave it out"
        )
    if query.shape[2] > MOST_DECODED:
        raise ValueError(f"key_summary=KeySummaries is for at most {MOST_DECODED} queries, got {query.shape[2]}")


class SummarySizes(NamedTuple):
    """What KeySummaries are made for."""

    batch: int
    key_heads: int
    capacity: int
    head_size: int
    dtype: torch.dtype
    device: torch.device


def check_summaries(sizes: SummarySizes, key: Tensor) -> None:
    """KeySummaries with room for these keys."""
    batch, key_heads, capacity, head_size, dtype, device = sizes
    shape = (batch, key_heads, head_size)
    if shape != (*key.shape[:2], key.shape[3]):
        raise ValueError(
            f"key_summary must be of these keys: of (batch, key heads, head size) {(*key.shape[:2], key.shape[3])}, "
            f"got {shape}"
        )
    if capacity < key.shape[2]:
        raise ValueError(f"key_summary must have room for {key.shape[2]} keys, got a capacity of {capacity}")
    if dtype != key.dtype:
        raise TypeError(f"key_summary must be for {key.dtype}, the dtype of the keys, got {dtype}")
    if device != key.device:
        raise ValueError(f"key_summary must be on the device of the keys, {key.device}, got {device}")


def check_summary_sizes(sizes: SummarySizes) -> None:
    """What KeySummaries may be made for."""
    for name, size in zip(sizes._fields[:4], sizes, strict=False):
        if not is_int(size):
            raise TypeError(f"{name} must be an integer, got {typed(size)}")
        least, most = (1, MAX_HEAD_SIZE) if name == "head_size" else (0, MOST_KEYS)
        if not least <= size <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {size}")
    if sizes.dtype not in SUMMARY_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {sizes.dtype}")


def check_appended(sizes: SummarySizes, key: object, key_lengths: object) -> None:
    """Keys to append to KeySummaries."""
    if not isinstance(key, Tensor):
        raise TypeError(f"key must be a torch.Tensor, got {type(key).__name__}")
    require_dense("key", key)
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (sizes.batch, sizes.key_heads, sizes.head_size):
        wanted = f"({sizes.batch}, {sizes.key_heads}, new keys, {sizes.head_size})"
        raise ValueError(f"key must have shape {wanted}, as these summaries are for, got {tuple(key.shape)}")
    if key.shape[2] > sizes.capacity:
        raise ValueError(f"key must have at most {sizes.capacity} new keys, the capacity, got {key.shape[2]}")
    if key.dtype != sizes.dtype:
        raise TypeError(f"key must be {sizes.dtype}, which these summaries are for, got {key.dtype}")
    if key.device != sizes.device:
        raise ValueError(f"key must be on {sizes.device}, the device of these summaries, got {key.device}")
    if key_lengths is not None:
        check_index("key_lengths", key_lengths, key, ((sizes.batch,),), "the key")


def check_room(sizes: SummarySizes, key: Tensor, lengths: Tensor) -> None:
    """New keys behind so many of each batch row. The lengths are read."""
    new, standing = key.shape[2], lengths.tolist()
    if max(standing, default=0) + new > sizes.capacity or min(standing, default=0) < 0:
        raise ValueError(f"key must end by the capacity, {sizes.capacity}, got {new} new keys behind {standing}")
