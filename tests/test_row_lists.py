"""Lists of single rows hold each flagged row once, in order, and whole blocks of other rows of the same tiles."""

from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from conftest import HAS_CUDA
from hypothesis import given, settings
from hypothesis import strategies as st

if not find_spec("triton"):
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl

from flash_entmax.backends.triton.gather import RowCount, append_rows, fill_last_block, load_bits, load_flags

DEVICE = "cuda" if HAS_CUDA else "cpu"
NOTHING = -7  # where no row was written


class RowsConfig(NamedTuple):
    """What gather.py reads of a Config."""

    TILE: int = 32
    WORDS: int = 1
    BITS: int = 32
    WHOLE_FROM: int = 16


WIDE = RowsConfig(64, 2, 32, 32)


@triton.jit
def flags_at(flags, index, inside, PACKED: tl.constexpr, C: tl.constexpr):
    return load_bits(flags, index, inside, C) if PACKED else load_flags(flags, index, inside, C)


@triton.jit
def list_kernel(
    flags, tiles, rows, taken, blocks, count, quota, length, SPAN: tl.constexpr, PACKED: tl.constexpr, C: tl.constexpr
):
    """List the rows of `count` tiles, SPAN at a time; the flags of place n of the list of tiles are number n."""
    listed, last, before = 0, -1, -1
    for first in range(0, count, SPAN):
        place = first + tl.arange(0, SPAN)
        inside = place < count
        tile = tl.load(tiles + place, mask=inside, other=0)
        own = flags_at(flags, place, inside, PACKED, C)
        counted, was_taken = append_rows(rows, RowCount(listed, last, before), quota, place, tile, own, inside, C)
        listed, last, before = counted
        tl.store(taken + place, was_taken.to(tl.int32), mask=inside)
    tl.debug_barrier()
    place = tl.where(tl.arange(0, 2) == 0, last, before)
    exists = place >= 0
    tile = tl.load(tiles + place, mask=exists, other=-1)
    own = flags_at(flags, place, exists, PACKED, C)
    tl.store(blocks, fill_last_block(rows, RowCount(listed, last, before), tile, own, length, C))


def pack(flags: torch.Tensor) -> torch.Tensor:
    """(tiles, rows) of 0 and 1 -> (tiles, words) int32."""
    bits = flags.long().unflatten(1, (-1, 32)) << torch.arange(32)
    return bits.sum(-1).to(torch.uint32).view(torch.int32)


def list_rows(flags, tiles, quota, length=None, span=4, packed=False, config=RowsConfig()):  # noqa: B008
    """(rows, blocks, taken) of the kernel; flags (tiles, rows), tiles ascending."""
    length = (max(tiles) + 1) * config.TILE if length is None else length
    rows = torch.full((quota + 2 * config.TILE,), NOTHING, dtype=torch.int32, device=DEVICE)
    taken, blocks = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (len(tiles), 1))
    given_flags = pack(flags) if packed else flags.to(torch.int8)
    numbers = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    list_kernel[(1,)](
        given_flags.contiguous().to(DEVICE), numbers, rows, taken, blocks, len(tiles), quota, length, SPAN=span,
        PACKED=packed, C=config, num_warps=1,
    )  # fmt: skip
    return rows.tolist(), blocks.item(), taken.bool().tolist()


def check_list(flags, tiles, quota, config=RowsConfig(), **options) -> list[bool]:  # noqa: B008
    """What holds for any flags; returns which tiles were taken."""
    rows, blocks, taken = list_rows(flags, tiles, quota, config=config, **options)
    flagged = [
        [tile * config.TILE + row for row in own.nonzero().flatten().tolist()]
        for tile, own in zip(tiles, flags, strict=True)
    ]
    expected = [row for own, is_taken in zip(flagged, taken, strict=True) if is_taken for row in own]
    count = len(expected)
    assert rows[:count] == expected, "the flagged rows of the tiles that are taken, in ascending order, once"
    assert count <= quota
    assert blocks == -(-count // config.TILE)
    filled = rows[count : blocks * config.TILE]
    assert set(rows[blocks * config.TILE :]) == {NOTHING}, "a row stands behind the last block"
    others = {
        row
        for tile, own, is_taken in zip(tiles, flagged, taken, strict=True)
        if is_taken
        for row in set(range(tile * config.TILE, (tile + 1) * config.TILE)) - set(own)
    }
    assert len(set(filled)) == len(filled)
    assert set(filled) <= others, "the last block holds a flagged row again, or one of another tile"
    fewest = 0
    for own, is_taken in zip(flagged, taken, strict=True):
        few = len(own) < config.WHOLE_FROM
        fewest += len(own) if few else 0
        assert not is_taken or few, "a tile that has too many rows is taken"
        assert is_taken or not few or fewest > quota, "a tile that fits is left whole"
    return taken


def some_flags(shares: list[float], seed: int, tile: int) -> torch.Tensor:
    draw = torch.rand(len(shares), tile, generator=torch.Generator().manual_seed(seed))
    return draw < torch.tensor(shares).unsqueeze(1)


shares = st.lists(st.sampled_from([0.0, 0.02, 0.05, 0.2, 0.45, 0.6, 1.0]), min_size=1, max_size=11)


@settings(max_examples=60)
@given(
    shares,
    st.integers(0, 10**6),
    st.sampled_from([32, 64, 320]),
    st.booleans(),
    st.sampled_from([2, 4, 16]),
    st.randoms(),
)
def test_any_flags(of_tiles, seed, quota, packed, span, random):
    flags = some_flags(of_tiles, seed, 32)
    tiles = sorted(random.sample(range(40), len(of_tiles)))
    check_list(flags, tiles, quota, packed=packed, span=span)


@pytest.mark.parametrize("packed", [False, True])
def test_tiles_of_64_rows_have_two_words(packed):
    flags = some_flags([0.1, 0.3, 0.0, 0.45, 0.05], 3, 64)
    assert check_list(flags, [0, 2, 3, 7, 9], 192, WIDE, packed=packed).count(True) > 2


@pytest.mark.parametrize("count", [1, 15])
def test_one_tile_fills_its_block_by_itself(count):
    """Even if its flagged rows are its first or its last ones."""
    for place in (slice(0, count), slice(32 - count, 32)):
        flags = torch.zeros(1, 32, dtype=torch.bool)
        flags[0, place] = True
        rows, blocks, _ = list_rows(flags, [5], 64)
        assert blocks == 1
        assert sorted(rows[:32]) == list(range(160, 192))


def test_half_of_a_tile_is_whole():
    flags = torch.zeros(3, 32, dtype=torch.bool)
    flags[0, :15] = flags[1, :16] = flags[2, 3] = True
    assert check_list(flags, [0, 1, 2], 64) == [True, False, True]


def test_what_exceeds_the_quota_stays_whole():
    flags = torch.zeros(6, 32, dtype=torch.bool)
    flags[:, ::3] = True  # 11 of each
    assert check_list(flags, list(range(6)), 32) == [True, True, False, False, False, False]
    assert check_list(flags, list(range(6)), 32, span=2) == [True, True, False, False, False, False]
    flags[4] = False
    flags[4, :10] = True
    assert check_list(flags, list(range(6)), 32, span=2) == [True, True, False, False, True, False]


def test_no_flag_lists_nothing():
    rows, blocks, taken = list_rows(torch.zeros(5, 32, dtype=torch.bool), [1, 2, 3, 4, 5], 64)
    assert (set(rows), blocks, taken) == ({NOTHING}, 0, [True] * 5)


def test_rows_past_the_last_one_are_filled_with_the_last():
    """Of queries, which are only marked by: what stands twice in their list does no harm there."""
    flags = torch.zeros(1, 32, dtype=torch.bool)
    flags[0, 2] = True
    rows, _, _ = list_rows(flags, [3], 64, length=3 * 32 + 10)
    assert rows[0] == 98
    assert max(rows) == 105
    assert set(rows[:32]) == set(range(96, 106))
