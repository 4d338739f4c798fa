"""Tile sizes and launch settings, as explicit rules of dtype and head size. Nothing is tuned at run time.

A setting may depend on the dtype, the head sizes and the device; never on a length, so a new length compiles nothing.
"""

import os
from dataclasses import dataclass

import torch

from ...core.call import Modifiers, Problem
from .tile import aligned_size

HAS_PTX = not torch.version.hip and os.environ.get("TRITON_INTERPRET") != "1"
WIDEST_PIPELINED = 128  # head size; tiles of larger heads fill the shared memory once


@dataclass(frozen=True)
class Shape:
    """Everything that the kernels are compiled for."""

    TILE: int  # queries and keys of one tile of the live map
    HEAD: int  # head size of queries and keys, a multiple of 16, and the power of two that holds it
    HEAD_PADDED: int
    VALUE: int  # head size of values, likewise
    VALUE_PADDED: int
    POWER: int  # 1 / (alpha - 1) where it is 1 or 2; 0 for any other alpha, whose exponent is a run-time number
    CAUSAL: bool
    PRECISION: str  # of float32 matrix products
    COMPENSATED: bool  # sums keep all digits of float32 over thousands of tiles
    ABREAST: int  # tiles of keys that the threshold's stages multiply at a time where no mask is needed
    LANES: int  # parts in which a row's sums are kept until its last tile
    SETTLED: float  # how much of sum u the solve may leave above that of the root
    HARDWARE: bool  # the processor's logarithm is exact enough
    INTERVALS: bool  # which keys a query sees is loaded; else all, or the causal ones
    FILTERED: bool  # a filter by tiles hides keys; what its tiles are told apart by:
    FILTER_BY_BATCH: bool
    FILTER_BY_HEAD: bool
    FILTER_BY_QUERY: bool
    SOFTCAP: bool
    ALIBI: bool
    PER_HEAD: bool  # scale, slope, exponent and cap are tensors of one number for each query head
    PARAMETERS: bool = False  # the gradient of alpha, scale and ALiBi slopes is asked for


@dataclass(frozen=True)
class Launch:
    """Warps per program, stages of the software pipeline, and the most registers that a thread may take."""

    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def padded_size(size: int) -> int:
    """The power of two that holds a head size."""
    return 1 << (size - 1).bit_length()


def tile_size(dtype: torch.dtype, size: int) -> int:
    """64 x 64 keeps the matrix units busy; float32 products run on the vector units and fill twice the memory.

    `size` is the larger head size, of keys or of values; above 256, half the tile fills the memory.
    """
    tile = 32 if dtype == torch.float32 else 64
    return tile if size <= 256 else tile // 2


def shape_of(problem: Problem, modifiers: Modifiers, dtype: torch.dtype) -> Shape:
    tile = tile_size(dtype, problem.widest)
    per_head = modifiers.alpha is not None
    power = 0 if per_head else {2.0: 1, 1.5: 2}.get(problem.alpha, 0)
    by_batch, by_head = (extent > 1 for extent in modifiers.kinds.shape[:2]) if modifiers.kinds is not None else (0, 0)
    head, value = aligned_size(problem.head_size), aligned_size(problem.value_size)
    head_padded, value_padded = padded_size(head), padded_size(value)
    if max(head_padded, value_padded) > WIDEST_PIPELINED:
        # Where loads are not asynchronous, Triton 3.6 may multiply wrongly by values narrower than the keys.
        head_padded = value_padded = max(head_padded, value_padded)
    return Shape(
        TILE=tile,
        HEAD=head,
        HEAD_PADDED=head_padded,
        VALUE=value,
        VALUE_PADDED=value_padded,
        POWER=power,
        CAUSAL=problem.is_causal and modifiers.intervals is None,
        PRECISION="ieee",
        COMPENSATED=dtype == torch.float32,
        ABREAST=2 if tile == 64 and head <= 64 and power and modifiers.slopes is None else 1,
        LANES=1 if dtype == torch.float32 else 8,
        SETTLED=2.0**-20 if dtype == torch.float32 else 2.0**-11,
        HARDWARE=dtype != torch.float32 and HAS_PTX,
        INTERVALS=modifiers.intervals is not None,
        FILTERED=modifiers.kinds is not None,
        FILTER_BY_BATCH=bool(by_batch),
        FILTER_BY_HEAD=bool(by_head),
        FILTER_BY_QUERY=modifiers.kinds is not None and modifiers.bits.shape[1] > 1,
        SOFTCAP=problem.softcap > 0,
        ALIBI=modifiers.slopes is not None,
        PER_HEAD=per_head,
    )


SUMMARY = Launch(4, 1)


def registers(shape: Shape, programs: int) -> int | None:
    """So many that `programs` of 128 threads share a multiprocessor; float32 needs all that there are."""
    return None if shape.COMPENSATED else 65536 // (128 * programs) // 8 * 8


def threshold_launch(shape: Shape) -> Launch:
    if shape.HEAD_PADDED <= 64:
        return Launch(4, 3, registers(shape, 4))
    return Launch(4, 2, registers(shape, 3)) if shape.HEAD_PADDED <= 128 else Launch(4, 2)


def output_launch(shape: Shape) -> Launch:
    return Launch(4, 3, registers(shape, 3)) if is_narrow(shape) else wide_launch(shape)


def gradient_launch(shape: Shape) -> Launch:
    return Launch(4, 2, registers(shape, 3)) if is_narrow(shape) else wide_launch(shape)


def tangent_launch(shape: Shape) -> Launch:
    return Launch(4, 2) if is_narrow(shape) else Launch(8, 1)


def is_narrow(shape: Shape) -> bool:
    return max(shape.HEAD_PADDED, shape.VALUE_PADDED) <= 64


def wide_launch(shape: Shape) -> Launch:
    """Heads over 128 double the accumulators: twice the warps share them, and one stage fits the shared memory."""
    return Launch(4, 2) if max(shape.HEAD_PADDED, shape.VALUE_PADDED) <= WIDEST_PIPELINED else Launch(8, 1)
