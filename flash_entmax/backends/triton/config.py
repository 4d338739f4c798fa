"""What a call is to its kernels: its outline, and what they are compiled for.

A Config follows from dtypes, head sizes, options and the device. It never depends on a length, so a new length compiles
nothing.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ...core.call import MOST_DECODED, Problem
from ...core.pages import Pages
from ...core.tensors import WORD_BITS, aligned_size, ceil_div
from ...core.threshold import power_of_alpha

HAS_PTX = not torch.version.hip and os.environ.get("TRITON_INTERPRET") != "1"
KEPT_BYTES = 512  # for each query of a head, beyond inputs, outputs and gradients
OTHER_BYTES = 32  # of these: maximum and offset, four more numbers in either pass, the summary, the words of a record.
# Where the backward makes bits again, two more numbers of each query take the room of the bits that are not kept.
WIDEST_PIPELINED = 128  # head size; one tile of a larger head fills the shared memory


@dataclass(frozen=True)
class Config:
    """Everything that the kernels are compiled for."""

    TILE: int  # queries, and keys, of one tile
    HEAD: int  # head size of queries and keys, a multiple of 16, and the power of two that holds it
    HEAD_PADDED: int
    VALUE: int  # head size of values, likewise
    VALUE_PADDED: int
    POWER: int  # 1 / (alpha - 1) where that is a whole number up to 16, else 0: the exponent is a run-time number
    CAUSAL: bool
    PRECISION: str  # of float32 matrix products
    COMPENSATED: bool  # sums keep all digits of float32 over thousands of tiles
    ROWS: int  # queries of a key head that share its keys in decode.py; 0 in other calls
    OVERLAPPED: bool  # in decode.py, a kernel starts before the one before it has ended
    PAGE: int  # keys of a page in decode.py; 0 where the keys of a head lie in one piece
    PACKED: bool  # the queries of all batch rows lie one after another; only where keys are in pages
    SCANNED: int  # tiles of queries that the scan takes at a time
    SCAN_TILES: int  # tiles of keys that it multiplies at a time where no mask is needed
    LANES: int  # parts in which a row's sums are kept until its last tile
    SETTLE_TOLERANCE: float  # how much of sum u the solve may leave above that of the root
    FAST_LOG2: bool  # the processor's own logarithm is exact enough
    INTERVALS: (
        bool  # a query sees an interval of keys, loaded or (in pages) a window; else all keys, or the causal ones
    )
    FILTERED: bool  # a filter by tiles hides keys; its tiles may differ by:
    FILTER_BY_BATCH: bool
    FILTER_BY_HEAD: bool
    FILTER_BY_QUERY: bool
    SOFTCAP: bool
    ALIBI: bool
    PER_HEAD: bool  # each query head has its own alpha and scale
    QUOTA: int  # single keys that a list holds at most, a multiple of TILE
    STORED_TILES: int  # up to so many tiles of keys, the forward pass stores which queries reach each of them
    NEEDS_BACKWARD: bool  # the forward pass stores what the backward reads
    NEEDS_PARAMETERS: bool  # the gradients of alpha, scale and ALiBi slopes, or their tangents, are asked for

    @property
    def WORDS(self) -> int:  # noqa: N802
        """Words of one bit for each row of a tile."""
        return words_per_tile(self.TILE)

    @property
    def BITS(self) -> int:  # noqa: N802
        """Bits of such a word."""
        return self.TILE // self.WORDS

    @property
    def WHOLE_FROM(self) -> int:  # noqa: N802
        """A tile of which so many rows are reached is listed whole."""
        return self.TILE // 2

    @property
    def MEAN(self) -> bool:  # noqa: N802
        """O1 is computed: for the backward, and in float32 for the last step of the output."""
        return self.NEEDS_BACKWARD or self.COMPENSATED


def padded_size(size: int) -> int:
    """The power of two that holds a head size."""
    return 1 << (size - 1).bit_length()


def is_decoded(problem: Problem, needs_backward: bool) -> bool:
    """Whether decode.py computes a call: by its shape alone."""
    return not needs_backward and problem.query_length <= MOST_DECODED


def tile_size(dtype: torch.dtype, size: int) -> int:
    """64 x 64 keeps the matrix units busy. float32 products run on the vector units and fill twice the memory.

    `size` is the larger head size, of keys or of values. Above 256, half the tile fills the memory.
    """
    tile = 32 if dtype == torch.float32 else 64
    return tile if size <= 256 else tile // 2


def words_per_tile(tile: int) -> int:
    return ceil_div(tile, WORD_BITS)


def reach_limits(dtype: torch.dtype, value_size: int, tile: int) -> tuple[int, int]:
    """(QUOTA, STORED_TILES): all that is kept of a query, O1 included, takes KEPT_BYTES, where O1 leaves room."""
    mean = aligned_size(value_size) * dtype.itemsize
    words = max(32, 128 * 128 // max(mean, 128))  # bytes: one bit for each tile of keys
    quota = max(64, KEPT_BYTES - OTHER_BYTES - mean - words)
    return quota * tile // 4 // tile * tile, words * tile // (4 * words_per_tile(tile))


class Outline(NamedTuple):
    """A problem without its tensors, for inputs of one dtype."""

    dtype: torch.dtype
    batch: int
    heads: int
    key_heads: int
    query_length: int
    key_length: int
    head_size: int
    value_size: int
    alpha: float | None  # None where alpha and scale are tensors
    scale: float | None
    softcap: float
    alibi: bool
    causal: bool
    intervals: bool
    filtered: tuple[bool, bool, bool, bool]  # a filter by tiles hides keys; its tiles differ by batch, head, query
    max_visible_span: int
    needs_backward: bool
    needs_parameters: bool
    decodes: bool  # few queries, no gradient: see decode.py
    overlaps: bool
    page: int  # keys of a page; 0 without pages
    packed: bool  # queries are packed, and keys in pages

    @classmethod
    def of(
        cls, problem: Problem, dtype: torch.dtype, needs_backward: bool = True, needs_parameters: bool = False,
        decodes: bool = False, overlaps: bool = False, pages: Pages | None = None,
    ) -> "Outline":  # fmt: skip
        alpha, scale, softcap, slopes = problem.score
        intervals, kinds, bits, causal, span = problem.visibility
        has_intervals = intervals is not None or (pages is not None and pages.has_window)
        if isinstance(alpha, torch.Tensor):
            alpha = scale = None
        filtered = NOT_FILTERED
        if kinds is not None:
            filtered = True, kinds.shape[0] > 1, kinds.shape[1] > 1, bits.shape[1] > 1
        return cls(
            dtype, problem.batch, problem.heads, problem.key_heads, problem.query_length, problem.key_length,
            problem.head_size, problem.value_size, alpha, scale, softcap, slopes is not None, causal, has_intervals,
            filtered, span, needs_backward, needs_parameters, decodes, overlaps,
            0 if pages is None else pages.page_size, pages is not None and pages.cu_seq_q is not None,
        )  # fmt: skip


NOT_FILTERED = (False, False, False, False)


def config_of(outline: Outline) -> Config:
    """The Config of a call. Equal calls get one object."""
    return _config(
        outline.dtype,
        outline.head_size,
        outline.value_size,
        power_of_alpha(outline.alpha),
        outline.causal and not outline.intervals,
        outline.intervals,
        outline.filtered,
        outline.softcap > 0,
        outline.alibi,
        outline.alpha is None,
        outline.needs_backward,
        outline.needs_parameters,
        padded_size(outline.query_length * outline.heads // outline.key_heads) if outline.decodes else 0,
        outline.overlaps,
        outline.page,
        outline.packed,
    )


@lru_cache(maxsize=1024)
def _config(
    dtype: torch.dtype,
    head_size: int,
    value_size: int,
    power: int,
    causal: bool,
    intervals: bool,
    filtered: tuple[bool, bool, bool, bool],
    softcap: bool,
    alibi: bool,
    per_head: bool,
    needs_backward: bool,
    needs_parameters: bool,
    rows: int,
    overlaps: bool,
    page: int,
    packed: bool,
) -> Config:
    tile = tile_size(dtype, max(head_size, value_size))
    head, value = aligned_size(head_size), aligned_size(value_size)
    head_padded, value_padded = padded_size(head), padded_size(value)
    if max(head_padded, value_padded) > WIDEST_PIPELINED:
        # Where loads are not asynchronous, Triton 3.6 may multiply wrongly by values narrower than the keys.
        head_padded = value_padded = max(head_padded, value_padded)
    if rows:
        head_padded = max(head_padded, 32)  # of numbers of 8 bits, matrix units multiply so many at a time
    is_single = dtype == torch.float32
    quota, stored_tiles = reach_limits(dtype, value_size, tile)
    return Config(
        TILE=tile,
        HEAD=head,
        HEAD_PADDED=head_padded,
        VALUE=value,
        VALUE_PADDED=value_padded,
        POWER=power,
        CAUSAL=causal,
        PRECISION="ieee",
        COMPENSATED=is_single,
        ROWS=min(max(rows, 8), 64 if head_padded <= WIDEST_PIPELINED else 16) if rows else 0,
        OVERLAPPED=overlaps,
        PAGE=page,
        PACKED=packed,
        # Neighbouring tiles of queries have about the same list only where every query sees the first keys. Heads of 64
        # lose more by the wider bookkeeping than they gain by the wider products.
        SCANNED=2 if tile == 64 and head_padded == 128 and not (intervals or filtered[0]) else 1,
        SCAN_TILES=2 if tile == 64 and head_padded <= 128 and not alibi else 1,
        LANES=1 if is_single else 8,
        SETTLE_TOLERANCE=2.0**-20 if is_single else 2.0**-11,
        FAST_LOG2=not is_single and HAS_PTX,
        INTERVALS=intervals,
        FILTERED=filtered[0],
        FILTER_BY_BATCH=filtered[1],
        FILTER_BY_HEAD=filtered[2],
        FILTER_BY_QUERY=filtered[3],
        SOFTCAP=softcap,
        ALIBI=alibi,
        PER_HEAD=per_head,
        QUOTA=quota,
        STORED_TILES=stored_tiles,
        NEEDS_BACKWARD=needs_backward,
        NEEDS_PARAMETERS=needs_parameters,
    )
