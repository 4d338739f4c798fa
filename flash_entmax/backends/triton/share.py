"""How the work on dK and dV is shared out: a tile of keys that very many queries reach gets several programs.

Trained models attend to their first token from everywhere. One program for that tile would still run when all others
are done. Its blocks of queries are split into equal parts, each for a program of its own, and the parts are added in
one order. So are other long lists, where there are too few tiles of keys for the whole GPU: a call with few key heads.
A program that is a part has a slot. Each key head has the same number of slots.

The plan of one key head and the tiles of a chunk, in int32: the tile of each slot, or -1; the first slot of each tile;
the parts of each tile, 0 where one program does all. Tiles count from the first of the chunk.
"""

import triton
import triton.language as tl

from .lists import BlockList, TileList
from .query_lists import block_counts
from .tile import UNSPECIALIZED, Sizes, head_of, store_tile

SPAN = tl.constexpr(128)
SLOTS = tl.constexpr(256)  # places for slots that one step looks at: there are no more
FEWEST = tl.constexpr(8)  # blocks: a tile of no more is never split
ADDED_ROWS = tl.constexpr(16)  # of a tile, that one program adds up over the parts


@triton.jit(do_not_specialize=UNSPECIALIZED)
def share_kernel(lists, shares, group, tiles, tile_capacity, row_capacity, slots, wanted, C: tl.constexpr):
    """The plan of one key head, which is a unit here.

    A tile of more than `most` blocks is split into the fewest equal parts of at most so many. `most` is twice the mean
    of the tiles, or what each of `wanted` programs has if they share all blocks, whichever is less; but not below
    FEWEST.

    Where the parts need more slots than there are, `most` grows by half until they do not: a tile of b > m blocks has
    fewer than 2 b / m parts of m blocks, so all have slots once m is twice the sum of blocks over the slots.
    """
    unit = tl.program_id(0)
    slot_tile = shares + unit * (slots + 2 * tiles)
    slot = tl.arange(0, SLOTS)
    tl.store(slot_tile + slot, tl.full((SLOTS,), -1, tl.int32), mask=slot < slots)
    total = tl.zeros((SPAN,), tl.int64)
    for first in range(0, tiles, SPAN):
        total += blocks_of_tiles(lists, unit, first, tiles, group, tile_capacity, row_capacity)
    blocks = tl.sum(total, 0)
    most = tl.maximum(tl.minimum(2 * blocks // tiles, blocks // wanted), FEWEST).to(tl.int32)
    while slots_needed(lists, unit, most, tiles, group, tile_capacity, row_capacity) > slots:
        most += (most + 1) // 2
    tl.debug_barrier()
    used = 0
    for first in range(0, tiles, SPAN):
        tile = first + tl.arange(0, SPAN)
        parts = parts_of(blocks_of_tiles(lists, unit, first, tiles, group, tile_capacity, row_capacity), most)
        last = used + tl.cumsum(parts, 0)
        used = tl.max(last, 0)
        tl.store(slot_tile + slots + tile, last - parts, mask=tile < tiles)
        tl.store(slot_tile + slots + tiles + tile, parts, mask=tile < tiles)
        for part in range(tl.max(parts, 0)):
            tl.store(slot_tile + last - parts + part, tile, mask=part < parts)


@triton.jit
def slots_needed(lists, unit, most, tiles, group, tile_capacity, row_capacity):
    """How many parts there are if none has more than `most` blocks."""
    needed = 0
    for first in range(0, tiles, SPAN):
        needed += tl.sum(parts_of(blocks_of_tiles(lists, unit, first, tiles, group, tile_capacity, row_capacity), most))
    return needed


@triton.jit
def parts_of(blocks, most):
    """In how many parts a tile with so many blocks is split; 0 where one program does all."""
    return tl.where(blocks > most, (blocks + most - 1) // most, 0)


@triton.jit
def blocks_of_tiles(lists, unit, first, tiles, group, tile_capacity, row_capacity):
    """(SPAN,): the blocks of queries in the lists of tiles of keys, over the query heads of a key head."""
    tile = first + tl.arange(0, SPAN)
    total = tl.zeros((SPAN,), tl.int32)
    for member in range(group):
        index = (unit * group + member) * tiles + tl.minimum(tile, tiles - 1)
        total += tl.load(block_counts(lists, index, tile_capacity, row_capacity), mask=tile < tiles, other=0)
    return total


@triton.jit
def share_of(shares, unit, slot, tile, slots, tiles):
    """(tile, part, parts) of a program that has a slot, or a tile (slot -1). Without any work, its tile is -1."""
    slot_tile = shares + unit * (slots + 2 * tiles)
    has_slot = slot >= 0
    tile = tl.load(slot_tile + slot, mask=has_slot, other=tile)
    exists = tile >= 0
    first_slot = tl.load(slot_tile + slots + tile, mask=exists, other=0)
    parts = tl.load(slot_tile + slots + tiles + tile, mask=exists, other=0)
    tile = tl.where(has_slot | (parts == 0), tile, -1)
    return tile, tl.where(has_slot, slot - first_slot, 0), tl.maximum(parts, 1)


@triton.jit
def blocks_between(blocks, low, high, C: tl.constexpr):
    """The blocks from number `low` up to number `high` of a list."""
    split, rows, masked = blocks.whole.split, blocks.row_blocks, blocks.whole.count - blocks.whole.split
    first, end = clamp(low, split), clamp(high, split)
    first_row, end_row = clamp(low - split, rows), clamp(high - split, rows)
    first_masked, end_masked = clamp(low - split - rows, masked), clamp(high - split - rows, masked)
    # A range that starts among the tiles with a mask has no other whole tile: both skips add up.
    whole = TileList(blocks.whole.tiles + first + first_masked, end - first, end - first + end_masked - first_masked)
    return BlockList(whole, blocks.rows + first_row * C.TILE, end_row - first_row)


@triton.jit
def clamp(number, most):
    return tl.minimum(tl.maximum(number, 0), most)


@triton.jit
def part_place(index, C: tl.constexpr):
    """Where the sums of the part at some index start: dK, and dV behind it."""
    return tl.cast(index, tl.int64) * (C.TILE * (C.HEAD_PADDED + C.VALUE_PADDED))


@triton.jit
def part_pointers(parts, index, SIZE: tl.constexpr, START: tl.constexpr, C: tl.constexpr):
    """(TILE, SIZE) pointers to the sums of the part at some index: dK starts at 0, dV behind it."""
    first = parts + part_place(index, C) + START
    return first + tl.arange(0, C.TILE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_parts_kernel(
    shares, parts, grad_key, grad_value, score_options, heads, group, query_length, key_length, first_unit, units,
    first_key, tiles, slots, C: tl.constexpr,
):  # fmt: skip
    """Some rows of dK and dV of one tile that was split, by programs of its first slot."""
    TILE: tl.constexpr = C.TILE
    HEAD_PADDED: tl.constexpr = C.HEAD_PADDED
    VALUE_PADDED: tl.constexpr = C.VALUE_PADDED
    sizes = Sizes(heads, group, query_length, key_length)
    index = tl.program_id(0) // (TILE // ADDED_ROWS)
    row = tl.program_id(0) % (TILE // ADDED_ROWS) * ADDED_ROWS
    unit, slot = index % units, index // units
    tile, part, count = share_of(shares, unit, slot, -1, slots, tiles)
    if (part == 0) & (tile >= 0):
        dk = sum_of_parts(parts + row * HEAD_PADDED, index, count, units, HEAD_PADDED, C)
        dv = sum_of_parts(parts + TILE * HEAD_PADDED + row * VALUE_PADDED, index, count, units, VALUE_PADDED, C)
        first = (first_key + tile) * TILE + row
        unit += first_unit
        store_gradients(grad_key, grad_value, dk, dv, unit, first, ADDED_ROWS, score_options.scale, sizes, C)


@triton.jit
def sum_of_parts(parts, index, count, units, SIZE: tl.constexpr, C: tl.constexpr):
    """(ADDED_ROWS, SIZE): the sum over `count` parts, of which each is `units` places behind the one before.

    PARTS are loaded without waiting for one another: as many as registers hold.
    """
    PARTS: tl.constexpr = 4 if SIZE <= 128 else 1
    place = tl.arange(0, ADDED_ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((ADDED_ROWS, SIZE), tl.float32)
    for first in range(0, count, PARTS):
        for number in tl.static_range(PARTS):
            part = parts + part_place(index + (first + number) * units, C)
            total += tl.load(part + place, mask=first + number < count, other=0.0)
    return total


@triton.jit
def store_gradients(grad_key, grad_value, dk, dv, unit, first, ROWS: tl.constexpr, scale, sizes, C: tl.constexpr):
    """Write so many rows of dK and dV, from `first` on. Heads of their own scales have it in dK already."""
    if not C.PER_HEAD:
        dk *= scale
    key_heads = sizes.heads // sizes.group
    batch, head = unit // key_heads, unit % key_heads
    store_tile(head_of(grad_key, batch, head), first, sizes.key_length, dk, ROWS, C.HEAD, C.HEAD_PADDED)
    store_tile(head_of(grad_value, batch, head), first, sizes.key_length, dv, ROWS, C.VALUE, C.VALUE_PADDED)
