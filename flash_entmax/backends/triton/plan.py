"""What a call launches: worked out once, and kept for all calls of the same sizes and options.

Scratch is bounded. Maxima and lists exist for one chunk of heads and rows at a time, and the next chunk writes over
them. reach.py says what stays for the gradient.
"""

from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from ...core.call import ScoreOptions, VisibilityArgs
from ...core.tensors import ceil_div
from . import schedule
from .config import Outline, config_of
from .decode import PART
from .launch import launcher_of
from .queries import KernelScoreOptions
from .reach import record_size, shapes_of
from .scratch import Scratch
from .share import ADDED_ROWS
from .visibility import KernelVisibility, bounds_kernel

MAXIMA = 2**26  # maxima of 2 bytes, and flags of 1 byte, in the scratch of one chunk: 192 MiB
QUERY_LISTS = 13 * 2**20  # listed queries and tiles of queries, and words, likewise, of 4 bytes: 52 MiB
LISTED = 2**24  # listed tiles of keys of 4 bytes in the scratch of one chunk: 64 MiB
REACHING = 9 * 2**22  # listed queries and tiles, words and sums of parts of the backward, likewise: 144 MiB
WANTED_PROGRAMS = 600  # of dK and dV: where a GPU runs 400 at a time, so many end at about the same time
SLOTS_OF_ALL = 768  # slots that the key heads share, see share.py, within the next three limits
FEWEST_SLOTS, MOST_SLOTS = 64, 256  # of a key head; no more than share.SLOTS
SLOTS_OF_TILE = 4  # of a key head, at most, for each of its tiles of keys
DECODED = 224 * 2**20  # bytes of the scratch of one chunk of decode.py
FEWEST_MARKED = 8  # tiles of keys: with fewer, single keys are not looked for
FEWEST_SHARED = 32  # tiles of queries of a group of heads: with fewer, no tile of keys is split


class Chunk(NamedTuple):
    """Some units and, of each, some tiles, whose lists have `capacity` places each."""

    first_unit: int
    units: int
    first_tile: int
    tiles: int
    capacity: int

    @property
    def programs(self) -> int:
        return self.units * self.tiles

    @property
    def places(self) -> int:
        return self.programs * self.capacity


def chunks(units: int, tiles: int, capacity: int, limit: int, later: int | None = None) -> list[Chunk]:
    """Split units x tiles so that no chunk has more than `limit` places. Whole units stay together while they fit.

    Tile t sees at most t + 1 + later of the `capacity` tiles on the other side; without `later`, any of them.
    """
    if tiles * capacity <= limit:
        parts = ceil_div(units, limit // max(1, tiles * capacity))
        size = ceil_div(units, parts)
        return [Chunk(unit, min(size, units - unit), 0, tiles, capacity) for unit in range(0, units, size)]
    result = []
    for unit in range(units):
        last = tiles
        while last > 0:  # from the end, where the lists are longest
            seen = capacity if later is None else min(capacity, max(1, last + later))
            count = min(last, max(1, limit // seen))
            result.append(Chunk(unit, 1, last - count, count, seen))
            last -= count
    return result


def most_places(parts: list[Chunk]) -> int:
    """Places for the lists of the largest chunk."""
    return max(chunk.places for chunk in parts)


class Plan:
    """What follows from an Outline: chunks, scratch, and the launcher of its Config."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.config = config = config_of(outline)
        self.launcher = launcher_of(config)
        self.units = outline.batch * outline.heads
        self.query_tiles = ceil_div(outline.query_length, config.TILE)
        self.key_tiles = ceil_div(outline.key_length, config.TILE)
        self.blocks = outline.batch * outline.key_heads * self.key_tiles
        self.centre_strides = self.blocks // outline.batch * config.HEAD, self.key_tiles * config.HEAD, config.HEAD
        self.group = outline.heads // outline.key_heads
        self.sizes = outline.heads, self.group, outline.query_length, outline.key_length  # the kernels' Sizes
        self.largest = max(self.units, outline.query_length, outline.key_length, self.centre_strides[0])
        self.list_size = min(self.key_tiles, outline.max_visible_span // config.TILE + 2)  # of a tile of queries
        self.options = None  # for all calls, where they are numbers
        if outline.alpha is not None and not outline.alibi:
            self.options = kernel_options(ScoreOptions(outline.alpha, outline.scale, outline.softcap))

    def chunks_of_queries(self, limit: int) -> list[Chunk]:
        """Chunks of tiles of queries, with lists of tiles of keys."""
        later = None
        if self.config.CAUSAL:
            later = ceil_div(self.outline.key_length - self.outline.query_length, self.config.TILE)
        return chunks(self.units, self.query_tiles, self.list_size, limit, later)

    @cached_property
    def forward_chunks(self) -> list[Chunk]:
        """Lists of queries take more than maxima where a tile of queries sees few of many keys: both are bounded."""
        limit = MAXIMA // self.config.TILE
        parts = self.chunks_of_queries(limit)
        while max(map(self.query_list_numbers, parts)) > QUERY_LISTS and max(chunk.programs for chunk in parts) > 1:
            limit //= 2
            parts = self.chunks_of_queries(limit)
        return parts

    def query_list_numbers(self, chunk: Chunk) -> int:
        """Numbers of the lists of queries of a chunk, and of its words."""
        words = 0 if self.are_words_kept else chunk.tiles * self.config.WORDS
        return chunk.units * self.keys_of(chunk) * (self.list_size_of(self.forward_query_list(chunk)) + words)

    @cached_property
    def query_chunks(self) -> list[Chunk]:
        return self.chunks_of_queries(LISTED)

    @cached_property
    def are_words_kept(self) -> bool:
        """Whether the forward pass keeps which queries reach each tile of keys."""
        return self.outline.needs_backward and self.key_tiles <= self.config.STORED_TILES

    @cached_property
    def is_marked(self) -> bool:
        """Whether single keys are looked for. Short rows have few tiles."""
        return self.key_tiles >= FEWEST_MARKED

    def keys_of(self, chunk: Chunk) -> int:
        """Tiles of keys that some tile of queries of the chunk sees, from the first one on: no later one is listed."""
        return chunk.capacity if self.config.CAUSAL else self.key_tiles

    def query_list(self, tiles: int, rows: int) -> tuple[int, int]:
        """(tile_capacity, row_capacity) of a list of queries from so many tiles. Parts start at multiples of 16
        bytes, and a list has at most half of the rows."""
        half = ceil_div(tiles, 2) * self.config.TILE
        return ceil_div(tiles, 4) * 4, max(self.config.TILE, min(rows, half) // self.config.TILE * self.config.TILE)

    def forward_query_list(self, chunk: Chunk) -> tuple[int, int]:
        """What is not listed as single queries, since it is too much, is not marked: an eighth of them is enough."""
        return self.query_list(chunk.tiles, min(self.config.QUOTA, chunk.tiles * self.config.TILE // 8))

    @cached_property
    def backward_query_list(self) -> tuple[int, int]:
        return self.query_list(self.query_tiles, max(self.config.QUOTA, self.outline.query_length // 16))

    def list_size_of(self, query_list: tuple[int, int]) -> int:
        """Numbers of a list of queries, see query_lists.py."""
        tiles, rows = query_list
        return 4 + 2 * tiles + rows

    @cached_property
    def key_chunks(self) -> list[Chunk]:
        """Chunks of tiles of keys, with lists of queries, their words where none are kept, and sums of parts."""
        places = self.group * (self.list_size_of(self.backward_query_list) + self.remade_words)
        places += ceil_div(self.slots * self.part_size, self.key_tiles)
        return chunks(self.units // self.group, self.key_tiles, places, REACHING)

    @cached_property
    def remade_words(self) -> int:
        """Words of one tile of keys and a query head that the backward computes: none where they are kept."""
        return 0 if self.are_words_kept else self.query_tiles * self.config.WORDS

    @cached_property
    def slots(self) -> int:
        """Programs of each key head for parts of tiles of keys, see share.py."""
        if self.group * self.query_tiles < FEWEST_SHARED:
            return 0
        share = max(FEWEST_SLOTS, ceil_div(SLOTS_OF_ALL, self.units // self.group))
        return min(MOST_SLOTS, share, SLOTS_OF_TILE * self.key_tiles)

    @cached_property
    def wanted_programs(self) -> int:
        """Over how many programs the work of a key head is spread, where its lists allow."""
        return ceil_div(WANTED_PROGRAMS, self.units // self.group)

    @property
    def adding_programs(self) -> int:
        """Of a key head, that add up the parts of tiles."""
        return self.slots * (self.config.TILE // ADDED_ROWS.value)

    @cached_property
    def forward_programs(self) -> list[tuple[Chunk, tuple, tuple, tuple]]:
        """Of each chunk, the units and tiles of the scan, and those of lists and marks, and more of their numbers."""
        programs = []
        for chunk in self.forward_chunks:
            heads = chunk.first_unit, chunk.units
            steps, place = ceil_div(chunk.tiles, self.config.SCANNED), (chunk.first_tile, chunk.tiles, chunk.capacity)
            place = *place, *self.forward_query_list(chunk)
            programs.append((chunk, (*heads, steps), (*heads, self.keys_of(chunk)), place))
        return programs

    @cached_property
    def reach_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of what is kept for the backward, see reach.py."""
        o = self.outline
        if not o.needs_backward:
            return (0,), (0,)
        sizes = o.batch, o.heads, o.query_length, o.key_length
        return shapes_of(sizes, self.config.TILE, self.config.QUOTA, self.config.STORED_TILES)

    @cached_property
    def forward_scratch(self) -> Scratch:
        """Lists and sublists of tiles, maxima, flags of keys, lists of queries, counts, four numbers of each row; the
        summary of each block of keys; thresholds and records unless kept."""
        config, parts = self.config, self.forward_chunks
        places, programs = most_places(parts), max(chunk.programs for chunk in parts)
        lists, counts = (torch.int32, places), (torch.int32, 4 * programs)
        spare = max(chunk.capacity for chunk in parts)  # see scan.py
        maxima = (torch.float16, (places + spare) * config.TILE)
        flags = (torch.int8, places * config.TILE * self.is_marked)
        sizes = [self.list_size_of(self.forward_query_list(chunk)) for chunk in parts]
        queries = [chunk.units * self.keys_of(chunk) * size for chunk, size in zip(parts, sizes, strict=True)]
        centre, numbers = (self.outline.dtype, self.blocks * config.HEAD), (torch.float32, self.blocks)
        row_count = self.units * self.outline.query_length
        row, threshold = (torch.float32, row_count), (torch.float32, 0 if self.outline.needs_backward else row_count)
        size = record_size(self.outline.key_length, config.TILE, config.QUOTA)
        records = (torch.int32, 0 if self.outline.needs_backward else programs * size)
        return Scratch(
            lists, lists, maxima, flags, (torch.int32, max(queries) * self.is_marked), counts, row, row, row, row,
            centre, numbers, numbers, numbers, threshold, threshold, records,
        )  # fmt: skip

    @cached_property
    def chunk_words(self) -> int:
        """Words of the largest chunk, where none are kept. They start as 0."""
        most = max(chunk.programs * self.keys_of(chunk) for chunk in self.forward_chunks)
        return 0 if self.are_words_kept else most * self.config.WORDS

    @cached_property
    def backward_scratch(self) -> Scratch:
        """The pairs of numbers of each query; its two for words that are computed again (`store_floors`); lists, of
        keys first and of queries later; these words; how the work is shared out: plans, sums of parts."""
        config = self.config
        rows = self.units * self.query_tiles * config.TILE
        floors = 0 if self.are_words_kept else 2 * rows
        programs, units = (max(getattr(chunk, name) for chunk in self.key_chunks) for name in ("programs", "units"))
        lists = programs * self.group * self.list_size_of(self.backward_query_list)
        parts = units * self.slots * self.part_size
        lists = max(most_places(self.query_chunks), lists)
        words = programs * self.group * self.remade_words
        number, index = torch.float32, torch.int32
        return Scratch(
            (number, 4 * rows), (number, floors), (index, lists), (index, words), (index, units * self.share_size),
            (number, parts),
        )  # fmt: skip

    @property
    def part_size(self) -> int:
        """Numbers of the sums of one part, see share.py."""
        return self.config.TILE * (self.config.HEAD_PADDED + self.config.VALUE_PADDED)

    @property
    def share_size(self) -> int:
        """Numbers of the plan of one key head, see share.py."""
        return self.slots + 2 * self.key_tiles if self.slots else 0

    @cached_property
    def decode_parts(self) -> int:
        """How many sums of parts a row of decode.py may have: none where PART holds every key."""
        parts = ceil_div(self.key_tiles * self.config.TILE, PART.value)
        return parts if parts > 1 else 0

    @cached_property
    def decode_chunks(self) -> list[Chunk]:
        """Chunks of key heads and, of each, rows, whose lines of scores have `capacity` numbers each."""
        rows, line = self.group * self.outline.query_length, self.key_tiles * self.config.TILE
        limit = DECODED // (4 * sum(self.decode_numbers(1, line))) * line
        return chunks(self.units // self.group, rows, line, limit)

    def decode_numbers(self, rows: int, scores: int) -> tuple[int, ...]:
        """Of so many rows with so many scores: scores, listed keys, maxima by tile of keys, listed tiles; the tiles
        that a row sees, the size of its support, how many programs have finished with it; sums of parts; and, where
        keys are not in 8 bits, the second largest score of each tile of keys and the key of the largest."""
        tiles, parts = scores // self.config.TILE, rows * self.decode_parts * self.config.VALUE_PADDED
        return scores, scores, tiles, tiles, 2 * rows, rows, rows, parts, tiles, tiles

    @cached_property
    def decode_scratch(self) -> Scratch:
        """The numbers of the largest chunk, of 4 bytes each."""
        rows, scores = (max(getattr(chunk, name) for chunk in self.decode_chunks) for name in ("programs", "places"))
        number, index = torch.float32, torch.int32
        dtypes = number, index, number, index, index, index, index, number, number, index
        return Scratch(*zip(dtypes, self.decode_numbers(rows, scores), strict=True))

    @cached_property
    def rounded_scratch(self) -> Scratch:
        """That of decoding by keys in 8 bits: further maxima by tile of keys."""
        *shared, numbers_of_tiles, _ = self.decode_scratch.arrays
        return Scratch(*shared, numbers_of_tiles)

    @cached_property
    def block_scratch(self) -> Scratch:
        """That of decoding by blocks of keys as well: further numbers by split."""
        return Scratch(*self.rounded_scratch.arrays, self.rounded_scratch.arrays[-1])

    @cached_property
    def list_scratch(self) -> Scratch:
        """Lists of tiles of keys."""
        return Scratch((torch.int32, most_places(self.query_chunks)))


plan_of = lru_cache(maxsize=256)(Plan)


def splits_of(programs: int, most: int, per_processor: int, device: torch.device) -> int:
    """Over how many programs the work of each of `programs` is split, so that every multiprocessor gets so many."""
    return max(1, min(most, per_processor * processors_of(device) // programs))


@cache
def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def kernel_options(score: ScoreOptions) -> KernelScoreOptions:
    """The options in the units of the kernels."""
    alpha, scale, softcap, slopes = score
    return KernelScoreOptions(
        scale,
        (alpha - 1.0) * scale,
        1.0 / (alpha - 1.0),
        softcap / scale if softcap else None,
        None if slopes is None else (slopes / scale).contiguous(),
    )


def kernel_visibility(visibility: VisibilityArgs, plan: Plan) -> KernelVisibility:
    """The problem's masks, and the bounds of the intervals of each tile of queries."""
    intervals, kinds, bits, *_ = visibility
    masks = {}
    if kinds is not None:
        masks |= {"tile_kinds": kinds, "tile_bits": bits}
    if intervals is not None and plan.outline.decodes:
        masks["intervals"] = intervals
    elif intervals is not None:
        bounds = intervals.new_empty(plan.outline.batch, plan.query_tiles, 4)
        masks |= {"intervals": intervals, "bounds": bounds}
        launch, arguments, _ = plan.launcher.open(
            (bounds_kernel,), (intervals, bounds), None, intervals.device, plan.largest
        )
        launch_bounds(launch, plan, *arguments)
    return KernelVisibility(**masks) if masks else NO_MASKS


def launch_bounds(launch: Callable[..., None], plan: Plan, intervals: Any, bounds: Any) -> None:
    """`intervals` and `bounds` are as the launch takes them."""
    programs, length = plan.outline.batch * plan.query_tiles, plan.outline.query_length
    launch(bounds_kernel, programs, schedule.summary_settings, intervals, bounds, length, plan.list_size)


NO_MASKS = KernelVisibility()
