"""The backend in plain PyTorch: for CPU tensors, float64, and any device without Triton."""

from torch import Tensor, device, dtype

from ...core.call import Problem
from .attention import attention_forward, attention_support
from .gradient import attention_backward, attention_tangent
from .key_summaries import append_keys
from .pages import attention_paged
from .parts import output_at, row_maxima, sums_at
from .reach import reach_shapes, reached_tiles
from .rows import entmax, entmax_backward, loss, loss_backward
from .tiles import TILE, summarise

__all__ = [
    "append_keys",
    "attention_backward",
    "attention_forward",
    "attention_paged",
    "attention_support",
    "attention_tangent",
    "entmax",
    "entmax_backward",
    "is_default_for",
    "loss",
    "loss_backward",
    "obstacle",
    "output_at",
    "prepare",
    "reach_shapes",
    "reached_tiles",
    "row_maxima",
    "summarise",
    "sums_at",
    "tile_size",
]


def obstacle(dtype: dtype, device: device) -> str:
    """Always empty: it takes every tensor."""
    return ""


def is_default_for(device: device) -> bool:
    return True


def tile_size(dtype: dtype, size: int) -> int:
    return TILE


def prepare(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Nothing: what PyTorch's own operators take is most of a call."""


def prepare_step(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Nothing, as above."""
