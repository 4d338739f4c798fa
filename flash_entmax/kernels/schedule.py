"""Tile sizes and launch settings, as explicit rules of dtype and head size. Nothing is tuned at run time.

A setting may depend on the dtype, the head sizes and the device; never on a length, so a new length compiles nothing.
"""

from dataclasses import dataclass

import torch

from ..problem import Problem


@dataclass(frozen=True)
class Shape:
    """Everything that the kernels are compiled for."""

    TILE: int  # queries and keys of one tile of the live map
    SCAN: int  # queries and keys of one tile of the dense scan, a multiple of TILE
    HEAD: int  # head size of queries and keys, and the power of two that holds it
    HEAD_PADDED: int
    VALUE: int  # head size of values, likewise
    VALUE_PADDED: int
    POWER: int  # 1 / (alpha - 1) where it is 1 or 2; 0 for any other alpha, whose exponent is a run-time number
    CAUSAL: bool
    PRECISION: str  # of float32 matrix products
    COMPENSATED: bool  # outputs keep all digits of float32 over thousands of tiles


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
    """The power of two that holds a head size; matrix units need at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def tile_size(dtype: torch.dtype) -> int:
    """64 x 64 keeps the matrix units busy; float32 products run on the vector units and fill twice the memory."""
    return 32 if dtype == torch.float32 else 64


def shape_of(problem: Problem, dtype: torch.dtype) -> Shape:
    tile = tile_size(dtype)
    head, value = padded_size(problem.head_size), padded_size(problem.value_size)
    return Shape(
        TILE=tile,
        SCAN=tile if dtype == torch.float32 or head > 128 else 128,
        HEAD=problem.head_size,
        HEAD_PADDED=head,
        VALUE=problem.value_size,
        VALUE_PADDED=value,
        POWER={2.0: 1, 1.5: 2}.get(problem.alpha, 0),
        CAUSAL=problem.is_causal,
        PRECISION="ieee",
        COMPENSATED=dtype == torch.float32,
    )


CERTIFY = Launch(4, 2)
LISTS = Launch(1, 1)


def scan_launch(shape: Shape) -> Launch:
    """At head sizes up to 64 two programs share a multiprocessor, which has 2 x 256 x 128 registers."""
    if shape.SCAN == 128:
        return Launch(8, 3, registers=128 if shape.HEAD_PADDED <= 64 else None)
    return Launch(4, 2)


def solve_launch(shape: Shape) -> Launch:
    return Launch(4, 3 if shape.HEAD_PADDED <= 128 else 2)


def output_launch(shape: Shape) -> Launch:
    return Launch(4, 3) if max(shape.HEAD_PADDED, shape.VALUE_PADDED) <= 64 else wide_launch(shape)


def gradient_launch(shape: Shape) -> Launch:
    return Launch(4, 2) if max(shape.HEAD_PADDED, shape.VALUE_PADDED) <= 64 else wide_launch(shape)


def wide_launch(shape: Shape) -> Launch:
    """Heads over 128 double the accumulators: twice the warps share them, and one stage fits the shared memory."""
    return Launch(4, 2) if max(shape.HEAD_PADDED, shape.VALUE_PADDED) <= 128 else Launch(8, 1)
