"""The backend in plain PyTorch computes by single keys where tiles of rows reach few, by whole tiles where most."""

import pytest
import torch
from cases import Case, attend, names, run
from checks import check_attention, recorded_words
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax.backends.torch import reach, tiles
from flash_entmax.backends.torch.tiles import Group, add_to_keys
from flash_entmax.core.call import Problem, ScoreOptions, VisibilityArgs
from flash_entmax.testing import iid_inputs


def most_pairs(batch, head, query, key):
    return (7 * query + key) % 5 > 0


PAIR = torch.tensor([0.4, 0.8])
LENGTHS = [1, 40, 64, 65, 2000, 2**16 - 1, 2**16, 2**17 + 70]
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "sparsemax": {"alpha": 2.0, "is_causal": True},
    "learned": {"alpha": 1.1 + PAIR, "scale": PAIR},
    "window": {"options": {"window_size": (150, 20)}},
    "key mask": {"options": {"key_mask": (torch.arange(400) % 7 > 0)[None]}, "is_causal": True},
    "block mask": {"options": {"block_mask": create_block_mask(most_pairs, None, None, 300, 400, device="cpu")}},
    "alibi": {"options": {"alibi_slopes": torch.tensor([0.02, -0.01])}, "is_causal": True},
    "softcap": {"options": {"softcap": 3.0}, "is_causal": True},
}


def striped_case(**fields) -> Case:
    """Six keys of each tile of 64 are large, so that every tile is reached, but few of its keys."""
    query, key, value = iid_inputs(1, 2, 300, 16, key_length=400, key_heads=1)
    key *= torch.where(torch.arange(400) % 64 // 6 == 2, 6.0, 0.1).unsqueeze(-1)
    return Case(query, key, value, **fields)


def problem_of(key_length: int, query_length: int = 70, batch: int = 1, heads: int = 2, key_heads: int = 1) -> Problem:
    visibility = VisibilityArgs(None, None, None, False, key_length)
    return Problem(batch, heads, key_heads, query_length, key_length, 4, 4, ScoreOptions(1.5, 1.0), visibility)


def widths_of(case: Case) -> set[int]:
    """Keys of a block, in the groups of a call's backward pass."""
    with torch.no_grad(), recorded_words() as kept:
        attend(case, "torch", return_support=True)
    return {group.width for group in reach.reached_groups(case.problem, kept[0])}


def test_single_keys_where_few_are_reached_whole_tiles_where_most():
    assert widths_of(striped_case()) == {1}
    assert widths_of(Case(*iid_inputs(1, 2, 300, 16))) == {64}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_keys_are_exact(name, dtype):
    case = striped_case(**OPTIONS[name])
    case = case.with_tensors(**{name: tensor.to(dtype) for name, tensor in case.tensors.items()})
    assert 1 in widths_of(case)
    check_attention(case, "torch")


def test_single_keys_and_whole_tiles_in_one_call():
    """The second half of the queries is small, and reaches nearly all keys."""
    case = striped_case()
    case.query[:, :, 128:] *= 0.01
    assert widths_of(case) == {1, 64}
    check_attention(case, "torch")


@pytest.mark.parametrize("length", LENGTHS)
def test_a_packed_map_has_its_shape_and_every_key(length):
    problem = problem_of(length)
    reached = torch.rand(2, 2, length, generator=torch.Generator().manual_seed(0)) < 0.02
    padded = torch.nn.functional.pad(reached, (0, -length % tiles.tile_rows(length)))
    words = reach.pack_keys(padded, length)
    shape, _ = reach.reach_shapes(problem, torch.float32)
    assert words.unflatten(0, (1, 2)).flatten(2).shape == shape
    unpacked = reach.unpack_keys(words, length)
    assert unpacked.shape == padded.shape
    assert unpacked[padded].all()
    span = reach.keys_of_a_bit(length)
    assert unpacked.sum() <= span * padded.sum()
    assert torch.equal(unpacked, padded) == (span == 1)


def test_a_packed_map_is_bounded():
    """1,048,576 keys: 128 bytes for each query of each head, beside the spare word."""
    shape, _ = reach.reach_shapes(problem_of(2**20, query_length=2**20), torch.float32)
    assert 4 * shape[-1] <= 128 * 2**20 + 4 * 2**14


def test_keys_that_share_a_bit_are_exact():
    query, key, value = iid_inputs(1, 1, 5, 8, key_length=2**16 + 100, seed=3)
    key[:, :, -100:] *= 2.0
    case = Case(query, key, value, is_causal=True)
    assert reach.keys_of_a_bit(key.shape[2]) == 2
    assert widths_of(case) == {1}
    check_attention(case, "torch")


def test_bands_of_query_tiles_give_the_same(monkeypatch):
    """One query tile at a time, as for long sequences."""
    case = striped_case(is_causal=True)
    expected = attend(case, "torch")
    monkeypatch.setattr(reach, "CHUNK_SCORES", 1)
    assert len(list(reach.bands(case.problem))) == 5
    torch.testing.assert_close(attend(case, "torch"), expected)
    check_attention(case, "torch")


def test_keys_that_fill_up_a_group_are_not_read():
    """Tiles of rows that reach fewer keys than others of their group are filled up with the first key of a tile."""
    case = striped_case(is_causal=True, options={"key_mask": (torch.arange(400) % 64 > 0)[None]})
    case.query[:, :, 128:192] *= 3.0  # which then reach fewer keys than other tiles
    assert widths_of(case) == {1}
    clean = run(case, "torch", case.grad_output())
    for tensor in (case.key, case.value):
        tensor[:, :, ::64] = torch.nan
    again = run(case, "torch", case.grad_output())
    for name, ours, theirs in zip(names(case), again.tensors, clean.tensors, strict=True):
        assert torch.equal(ours, theirs), name


def mixed_group(problem: Problem, width: int) -> Group:
    """Of 30 tiles of rows of each unit, four fifths of all blocks of keys, in any order."""
    generator = torch.Generator().manual_seed(0)
    rows, blocks = 30 * problem.batch * problem.heads, problem.key_length // width
    used = torch.rand(rows, blocks, generator=generator) < 0.8
    order = torch.rand(rows, blocks, generator=generator).argsort(-1)
    return Group(torch.arange(rows) % 4, torch.arange(rows) // 4, order, used, width)


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("threads", [1, 4])
def test_sums_over_tiles_of_rows_run_in_one_order(width, threads):
    """Of each key: tile of rows by tile of rows, bit for bit."""
    problem = problem_of(64 * 40, 64 * 30, batch=2)
    group, expected = mixed_group(problem, width), torch.zeros(2, 40, 64, 4)
    parts = torch.randn(*group.block.shape, width * 4, generator=torch.Generator().manual_seed(1))
    for row, used in enumerate(group.used):
        blocks = expected[int(group.unit[row]) // 2].view(-1, width * 4)
        blocks[group.block[row, used]] += parts[row, used]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        total = torch.zeros_like(expected)
        add_to_keys(problem, total, group, parts.view(len(parts), -1, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(total, expected)


def test_turns_give_the_same_sums():
    """Where the order of additions to one place is not fixed, as on a GPU. No turn has a block of keys twice."""
    problem = problem_of(64 * 40, 64 * 30, batch=2)
    group = mixed_group(problem, 64)
    places, chosen = tiles.block_places(problem, group), list(tiles.turns(problem, group))
    assert all(len(places[turn].unique()) == len(turn) for turn in chosen)
    parts = torch.randn(*group.block.shape, 64 * 4, generator=torch.Generator().manual_seed(1))
    total, expected = torch.zeros(2, 2, 40, 64, 4)
    for turn in chosen:
        total.view(-1, 64 * 4).index_add_(0, places[turn], parts.flatten(0, 1)[turn])
    add_to_keys(problem, expected, group, parts.view(len(parts), -1, 4))
    assert torch.equal(total, expected)
