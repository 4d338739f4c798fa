"""Tile sizes and launch settings, as explicit rules of dtype and head size. Nothing is tuned at run time.

A rule may depend on the dtype, the head sizes and the device. It never depends on a length, so a new length compiles
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

HAS_PTX = not torch.version.hip and os.environ.get("TRITON_INTERPRET") != "1"
ADDING_PROGRAMS = 2  # of decode.py on a multiprocessor
LISTED_SCORING_PROGRAMS = 4  # of decode_summaries.py where blocks of keys are left out
KEPT_BYTES = 512  # for each query of a head, beyond inputs, outputs and gradients
OTHER_BYTES = 32  # of these: maximum and offset, four more numbers in either pass, the summary, the words of a record
WIDEST_PIPELINED = 128  # head size; one tile of a larger head fills the shared memory


@dataclass(frozen=True)
class Config:
    """Everything that the kernels are compiled for."""

    TILE: int  # queries, and keys, of one tile
    HEAD: int  # head size of queries and keys, a multiple of 16, and the power of two that holds it
    HEAD_PADDED: int
    VALUE: int  # head size of values, likewise
    VALUE_PADDED: int
    POWER: int  # 1 / (alpha - 1) where it is 1 or 2; 0 for any other alpha, whose exponent is a run-time number
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


@dataclass(frozen=True)
class LaunchSettings:
    """Warps per program, stages of the software pipeline, the most registers that a thread may take; and whether the
    kernel may start before the one before it has ended (programmatic dependent launch)."""

    warps: int
    stages: int
    registers: int | None = None
    overlapped: bool = False

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        overlap = {"launch_pdl": True} if self.overlapped else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit, **overlap}


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
        {2.0: 1, 1.5: 2}.get(outline.alpha, 0),
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


def summary_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 1)


def registers(config: Config, programs: int) -> int | None:
    """So many that `programs` of 128 threads share a multiprocessor; float32 needs all that there are."""
    return None if config.COMPENSATED else 65536 // (128 * programs) // 8 * 8


def scan_settings(config: Config) -> LaunchSettings:
    """128 queries by 128 keys for twice the warps: each number that is loaded serves twice as many products."""
    if config.SCANNED > 1:
        return LaunchSettings(8, 2, registers(config, 4))
    return mark_settings(config)


def append_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4 if config.HEAD_PADDED <= WIDEST_PIPELINED else 8, 1)


def certify_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(2, 1)


def list_settings(config: Config) -> LaunchSettings:
    """One warp: what it scans needs no exchange between warps."""
    return LaunchSettings(1, 1)


def is_pipelined(config: Config) -> bool:
    """Matrix units multiply tiles of keys of which several fit the shared memory."""
    return config.HEAD_PADDED <= WIDEST_PIPELINED and not config.COMPENSATED


def is_light(config: Config) -> bool:
    """So few rows share a tile of keys in decode.py that one or two warps keep up with memory."""
    return config.ROWS <= 16 and is_pipelined(config)


def decode_scores_settings(config: Config) -> LaunchSettings:
    """With more warps than one, each computes the same addresses, and the maxima of a row cross warps. Programs of one
    warp are many, so that two stages of each keep memory busy.

    Keys in pages wait for the numbers of their pages: twice the stages, less the first, have as many tiles of keys on
    their way.
    """
    warps, stages = (1, 2) if is_light(config) else (4, 4 if is_pipelined(config) else 2)
    return LaunchSettings(warps, 2 * stages - 1 if config.PAGE else stages)


def scoring_programs(config: Config) -> int:
    """On a multiprocessor. With four warps and four stages, more than two do not run at once."""
    if not is_light(config):
        return 2
    return 8 if config.PAGE else 4


def rounded_scores_settings(config: Config) -> LaunchSettings:
    """With registers for all programs of a multiprocessor."""
    warps, stages = (2, 3) if is_light(config) else (4, listed_scores_settings(config).stages)
    limit = None
    if config.HEAD_PADDED <= WIDEST_PIPELINED:
        limit = registers(config, rounded_scoring_programs(config) * warps // 4)
    return LaunchSettings(warps, stages, limit)


def rounded_scoring_programs(config: Config) -> int:
    """On a multiprocessor: keys in 8 bits are half of the bytes, and more steps for each of them."""
    return 6 if is_light(config) else 4


def listed_scores_settings(config: Config) -> LaunchSettings:
    """A list of tiles takes more registers than LISTED_SCORING_PROGRAMS programs of a multiprocessor have."""
    return LaunchSettings(4, 4 if config.HEAD_PADDED <= 2 * WIDEST_PIPELINED else 2)


def block_bounds_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 2)


def decode_row_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 2, overlapped=config.OVERLAPPED)


def mark_settings(config: Config) -> LaunchSettings:
    if config.HEAD_PADDED <= 64:
        return LaunchSettings(4, 3, registers(config, 4))
    return LaunchSettings(4, 2, registers(config, 3)) if config.HEAD_PADDED <= 128 else LaunchSettings(4, 2)


def solve_settings(config: Config) -> LaunchSettings:
    if 64 < config.HEAD_PADDED <= 128:
        return LaunchSettings(4, 3, registers(config, 4))
    return mark_settings(config)


def output_settings(config: Config) -> LaunchSettings:
    """Of the output, and of the gradients."""
    return LaunchSettings(4, 2, registers(config, 3)) if is_narrow(config) else wide_settings(config)


def tangent_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 2) if is_narrow(config) else LaunchSettings(8, 1)


def is_narrow(config: Config) -> bool:
    return max(config.HEAD_PADDED, config.VALUE_PADDED) <= 64


def wide_settings(config: Config) -> LaunchSettings:
    """Heads over 128 double the accumulators: twice the warps share them, and one stage fits the shared memory."""
    return (
        LaunchSettings(4, 2)
        if max(config.HEAD_PADDED, config.VALUE_PADDED) <= WIDEST_PIPELINED
        else LaunchSettings(8, 1)
    )
