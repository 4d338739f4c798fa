"""Every option with every other: drawn calls against the reference, twice, bit by bit.

The default profile draws the same few examples every third day; conftest says how to draw others for hours.
"""

import random
from functools import partial
from itertools import product

import pytest
import torch
from cases import Case, attend, make_case, names, packed_case, run
from checks import check_attention, score_rounding
from conftest import FUZZ_EXAMPLES, FUZZ_KITS, PROFILE, THIRD
from decoding import check_decode
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from paged_cases import PagedCase, check_pages, make_paged_case
from single_keys import limits_of, lone_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax import KeySummaries
from flash_entmax.testing import KEY_PATTERNS, key_sparse_inputs, poisoned

numbers = st.sampled_from
alphas = (st.just(1.5), st.just(2.0), st.one_of(st.sampled_from([1.25, 1.2, 1.1]), st.floats(1.05, 2.0)))
slope_values = numbers([0.0, 0.01, 0.3, 2.0, 50.0, -0.05, -1.0, float("inf")])
dims = (1, 3, 8, 16, 17, 32, 64, 80, 128, 256, 512)
FAMILIES = 6  # of calls, a test each
SHARDS = 16 if PROFILE == "fuzz" else 1  # so that pytest-xdist can share the examples out
pytestmark = [pytest.mark.timeout(0)] if PROFILE == "fuzz" else []  # hours are asked for
MASK_MODS = {
    "causal": lambda b, h, q, k: k <= q,
    "sliding": lambda b, h, q, k: (q - k).abs() <= 33,
    "documents": lambda b, h, q, k: q // 37 == k // 37,
    "by head": lambda b, h, q, k: (q + k) % (h + 2) == 0,
    "by batch": lambda b, h, q, k: k >= 70 * b,
}


class Kit:
    """What the kernels of a call are compiled for, picked by a number: a GPU compiles few of them for many calls."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)

    def pick(self, choices):
        return self.random.choice(list(choices))


def kits(backend, shard: int):
    """On a GPU a kit takes seconds to compile; elsewhere nothing is compiled."""
    few = FUZZ_KITS if backend.device == "cuda" else 10**6
    return st.integers(shard * few, (shard + 1) * few - 1).map(Kit)


def lengths(longest: int):
    return st.one_of(st.integers(1, longest), numbers([1, 63, 64, 65]))


@st.composite
def learned(draw, kit: Kit, values, heads: int, device: str):
    """A number, or a tensor of one for all heads or of one for each."""
    kind = kit.pick(["number", "number", "scalar", "by head"])
    if kind == "number":
        return draw(values)
    count = heads if kind == "by head" else 1
    tensor = torch.tensor([draw(values) for _ in range(count)], device=device)
    return tensor if kind == "by head" else tensor.squeeze(0)


@st.composite
def scores(draw, kit: Kit, batch: int, heads: int, device: str) -> dict:
    """Options that change scores."""
    options = {"alpha": draw(learned(kit, kit.pick(alphas), heads, device))}
    if kit.pick([False, False, True]):
        options["softcap"] = draw(numbers([0.5, 5.0, 30.0]))
    if kit.pick([False, True]):
        options["scale"] = draw(learned(kit, numbers([0.05, 0.3, 1.0]), heads, device))
    if kit.pick([False, True]):
        shape = draw(numbers([(heads,), (batch, heads)])) if batch else (heads,)
        values = [draw(slope_values) for _ in range(torch.Size(shape).numel())]
        options["alibi_slopes"] = torch.tensor(values, device=device).view(shape)
    return options


@st.composite
def intervals(draw, kit: Kit) -> dict:
    options, sizes = {"is_causal": kit.pick([False, True])}, numbers([-1, -1, 0, 1, 20, 64, 100])
    return options | ({"window_size": (draw(sizes), draw(sizes))} if kit.pick([False, True]) else {})


@st.composite
def positions(draw, kit: Kit, batch: int, queries: int, keys: int, device: str, seed: int) -> dict:
    kind = kit.pick(["none", "first", "row", "rows"])
    if kind == "first":
        return {"query_positions": draw(st.integers(-50, keys + 50))}
    generator = torch.Generator().manual_seed(seed)
    shape = {"row": (queries,), "rows": (batch, queries)}.get(kind)
    dtype = draw(numbers([torch.int32, torch.int64]))
    if shape is None:
        return {}
    return {"query_positions": torch.randint(-20, keys + 20, shape, generator=generator).to(device, dtype)}


@st.composite
def masks(draw, kit: Kit, batch: int, heads: int, queries: int, keys: int, device: str, seed: int) -> dict:
    kinds = {kit.pick(["key_lengths", "none"]), kit.pick(["key_mask", "block_mask", "none"])}
    generator = torch.Generator().manual_seed(seed + 1)
    options = {}
    if "key_lengths" in kinds:
        options["key_lengths"] = torch.randint(0, keys + 1, (batch,), generator=generator).to(device)
    if "block_mask" in kinds:
        mask_mod, block = MASK_MODS[kit.pick(sorted(MASK_MODS))], draw(numbers([64, 128]))
        extents = kit.pick([(None, None), (batch, heads)])
        extents = (batch, heads) if mask_mod in (MASK_MODS["by head"], MASK_MODS["by batch"]) else extents
        options["block_mask"] = create_block_mask(mask_mod, *extents, queries, keys, device=device, BLOCK_SIZE=block)
    elif "key_mask" in kinds:
        density = draw(numbers([0.0, 0.05, 0.5, 0.95]))
        options["key_mask"] = (torch.rand(batch, keys, generator=generator) < density).to(device)
    return options


@st.composite
def padded_calls(draw, backend, shard: int, longest: int, most_queries: int | None = None) -> Case:
    kit = draw(kits(backend, shard))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    group = 1 if backend.is_interpreted and key_heads == 2 else group
    batch, heads = kit.pick([1] if backend.is_interpreted else [1, 2]), key_heads * group
    queries = draw(st.integers(1, most_queries) if most_queries else lengths(longest))
    keys = draw(lengths(longest))
    seed, device = draw(st.integers(0, 10**6)), backend.device
    options = draw(scores(kit, batch, heads, device)) | draw(intervals(kit))
    options |= draw(positions(kit, batch, queries, keys, device, seed))
    options |= draw(masks(kit, batch, heads, queries, keys, device, seed))
    if "key_lengths" in options and queries != keys:
        options.setdefault("query_positions", keys - queries)
    case = make_case(
        backend, heads, queries, kit.pick(dims), batch=batch, seed=seed, key_length=keys, key_heads=key_heads,
        value_dim=kit.pick(dims), dtype=kit.pick(backend.dtypes), **options,
    )  # fmt: skip
    if few := draw(numbers([0, 0, 3, 20])):  # keys that repeat: equal scores, and crowds of them at the threshold
        case.key = case.key[:, :, torch.arange(keys, device=device) % few]
    if draw(st.booleans()):
        case.query, case.key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.query, case.key))
    return case


@st.composite
def decoding_calls(draw, backend, shard: int, longest: int) -> tuple[Case, dict]:
    """A padded call of few queries, and how many bytes the scratch of one chunk has: all, one row's, or some rows'."""
    case = draw(padded_calls(backend, shard, longest, most_queries=16))
    return case, {"DECODED": draw(numbers([2**27, 10**5, 10**4]))}


@st.composite
def paged_calls(draw, backend, shard: int, longest: int) -> PagedCase:
    """Few queries for each row of keys in pages, or more than the kernels of few queries take."""
    kit = draw(kits(backend, shard))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    heads, lengths = key_heads * group, st.one_of(st.integers(0, longest), numbers([0, 1, 63, 64, 65]))
    options = draw(scores(kit, 0, heads, backend.device))
    if kit.pick([False, True]):
        options["window_size"] = (draw(numbers([0, 1, 20, 100])), draw(numbers([-1, 0, 5])))
    return make_paged_case(
        backend, tuple(draw(st.lists(lengths, min_size=1, max_size=3))), kit.pick([1, 16, 32, 48, 64, 128]),
        queries=draw(st.integers(1, 18)), heads=heads, key_heads=key_heads, dim=kit.pick(dims),
        value_dim=kit.pick(dims), dtype=kit.pick(backend.dtypes), index_dtype=draw(numbers([torch.int32, torch.int64])),
        behind=draw(numbers(["NaN page", "far", "negative"])), seed=draw(st.integers(0, 10**6)), **options,
    )  # fmt: skip


@st.composite
def packed_calls(draw, backend, shard: int, longest: int) -> Case:
    kit = draw(kits(backend, shard))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 1 if backend.is_interpreted else 2))
    heads, seed = key_heads * group, draw(st.integers(0, 10**6))
    parts = st.lists(numbers([0, 1, 2, 5, 31, 64, longest // 2]), min_size=1, max_size=4)
    queries = draw(parts)
    keys = draw(st.one_of(st.none(), st.lists(st.integers(0, 60), min_size=len(queries), max_size=len(queries))))
    options = draw(scores(kit, 0, heads, backend.device)) | draw(intervals(kit))
    spare = draw(numbers([0, 0, 3, 70]))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        row = torch.randint(-5, longest, (sum(queries) + spare,), generator=generator)
        options["query_positions"] = row.to(backend.device)
    index_dtype, dtype = draw(numbers([torch.int32, torch.int64])), kit.pick(backend.dtypes)
    return packed_case(
        backend, queries, keys, heads=heads, key_heads=key_heads, dim=kit.pick(dims), value_dim=kit.pick(dims),
        spare=spare, index_dtype=index_dtype, dtype=dtype, seed=seed, **options,
    )  # fmt: skip


@st.composite
def key_sparse_calls(draw, backend, shard: int, longest: int) -> tuple[Case, dict]:
    """A padded call whose queries attend to few keys, and limits.

    Keys are scattered, stripes, a sink, one in every tile, all keys of one tile, or a few for each query.
    """
    case = draw(padded_calls(backend, shard, longest))
    batch, heads, queries, dim = case.query.shape
    key_heads, keys = case.key.shape[1:3]
    make = draw(numbers([*(partial(key_sparse_inputs, pattern) for pattern in KEY_PATTERNS), few_keys_for_each]))
    more = {"key_heads": key_heads, "dtype": case.query.dtype, "device": backend.device}
    query, key, _ = make(batch, heads, max(queries, keys), dim, seed=draw(st.integers(0, 10**6)), **more)
    case.query, case.key = query[:, :, -queries:].contiguous(), key[:, :, :keys].contiguous()
    limits = {"reach": draw(numbers([None, (64, 0), (64, 1024), (128, 2)]))}
    if draw(st.booleans()):
        limits |= {"MAXIMA": draw(numbers([64, 500])), "LISTED": draw(numbers([2, 10])), "REACHING": 500}
    if draw(st.booleans()):
        limits |= {"FEWEST_SHARED": 0, "MOST_SLOTS": draw(numbers([1, 4, 64, 256]))}
        limits["WANTED_PROGRAMS"] = draw(numbers([1, 30, 600]))
    if backend.is_interpreted:
        limits["blocks_of_part"] = draw(numbers([1, 2]))
    return case, limits


def few_keys_for_each(batch: int, heads: int, length: int, dim: int, **options):
    return lone_inputs(length, dim, batch=batch, heads=heads, **options)


def check_drawn(case: Case, impl: str) -> None:
    """Within budget of the reference, without NaN, and the same bits again."""
    result = check_attention(case, impl, more=score_rounding(case))
    again = run(case, impl, result.grad_output)
    for name, ours, theirs in zip(names(case), again.tensors, result.tensors, strict=True):
        assert ours.isfinite().all(), name
        assert torch.equal(ours, theirs), f"{name}: other bits"


def check_decoded(case: Case, impl: str) -> None:
    """Without gradients: within budget, finite, and the same bits whatever its memory held before."""
    actual = check_decode(case, impl, more=score_rounding(case))
    assert actual.isfinite().all()
    with poisoned():
        assert torch.equal(attend(case, impl), actual), "memory that was not written reached the output"


def check_by_summaries(case: Case, impl: str) -> None:
    """With all keys in 8 bits and with half of them, and with bounds of blocks: within budget, and finite."""
    keys = case.key.shape[2]
    for appended, skips_blocks in product((keys, keys // 2), (False, True)):
        summaries = KeySummaries.of(case.key[:, :, :appended], capacity=keys, skips_blocks=skips_blocks, impl=impl)
        actual = check_decode(case, impl, more=score_rounding(case), key_summary=summaries)
        assert actual.isfinite().all()


def check_paged(case: PagedCase, impl: str) -> None:
    """The bits of keys in one piece. In plain PyTorch a product of copies may add up in another order."""
    if impl == "triton":
        check_pages(case, impl)
    else:
        torch.testing.assert_close(case.attend(impl), case.attend_in_one_piece(impl))


def check_calls(backend, calls, shard: int, examples: int, check_call=check_drawn) -> None:
    # To shrink a failure would take the interpreter minutes.
    phases = [phase for phase in Phase if phase is not Phase.shrink or not backend.is_interpreted]
    if PROFILE == "fuzz":
        examples = FUZZ_EXAMPLES // (FAMILIES * SHARDS)
    elif backend.impl == "torch":  # the third of the day, whose kits the other two have not
        shard, examples = shard + FAMILIES * SHARDS * THIRD, examples // 3

    @settings(max_examples=examples, phases=phases)
    @given(calls(backend, shard, backend.sizes(80, 200, 1000)))
    def check(call):
        case, numbers = call if isinstance(call, tuple) else (call, {})
        with limits_of(backend, **numbers):
            check_call(case, backend.impl)

    check()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_padded_call(backend, shard):
    check_calls(backend, padded_calls, shard, backend.sizes(6, 300, 100))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_packed_call(backend, shard):
    check_calls(backend, packed_calls, SHARDS + shard, backend.sizes(4, 150, 50))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_key_sparse_call(backend, shard):
    check_calls(backend, key_sparse_calls, 2 * SHARDS + shard, backend.sizes(10, 30, 50))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_decoding_call(backend, shard):
    check_calls(backend, decoding_calls, 3 * SHARDS + shard, backend.sizes(10, 30, 50), check_decoded)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_call_by_keys_in_8_bits(backend, shard):
    if backend.impl == "torch":
        pytest.skip("plain PyTorch reads the keys themselves")
    check_calls(backend, decoding_calls, 4 * SHARDS + shard, backend.sizes(5, 0, 50), check_by_summaries)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_call_by_pages(backend, shard):
    check_calls(backend, paged_calls, 5 * SHARDS + shard, backend.sizes(6, 30, 50), check_paged)
