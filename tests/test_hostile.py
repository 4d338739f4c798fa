"""Inputs and memory that break attention kernels: NaN and inf, poisoned buffers, defects known from other packages."""

from dataclasses import replace

import pytest
import torch
from cases import Case, attend, crowd, run
from checks import assert_unchanged, check_attention, check_bad_key, check_bad_query, check_row_sums, check_spoiled
from decoded_by_summaries import decode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax import KeySummaries, entmax_attention
from flash_entmax.testing import iid_inputs, poisoned, score_rows, topic_inputs

BAD = (torch.nan, torch.inf, -torch.inf)
each_bad = pytest.mark.parametrize("bad", BAD)
each_mask = pytest.mark.parametrize("is_causal", [False, True])


@each_bad
@each_mask
@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_a_bad_query_spoils_its_own_row_only(backend, bad, is_causal, alpha):
    check_bad_query(bad, alpha, is_causal, backend.impl, backend.device)


@pytest.mark.parametrize("bad", BAD[:2])
@each_mask
@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_a_bad_key_spoils_the_rows_that_see_it(backend, bad, is_causal, alpha):
    check_bad_key(bad, alpha, is_causal, backend.impl, backend.device)


OVERFLOWING = "none", "key mask", "hides whole tiles", "block mask", "slopes", "infinite slopes"


def overflowing(mask, queries, device):
    """All scores of query 1 that it sees overflow to -inf, and those of hidden keys to inf. Other rows are harmless."""
    keys = 70
    query, key, value = iid_inputs(1, 2, queries, 16, key_length=keys, key_heads=1, device=device)
    seen, options = torch.arange(keys) % 3 > 0, {}
    if mask == "hides whole tiles":
        seen = torch.arange(keys) >= 64
    if mask == "block mask":
        by_key = seen.to(device)
        options["block_mask"] = create_block_mask(
            lambda b, h, i, j: by_key[j], None, None, queries, keys, device=device, BLOCK_SIZE=64
        )
    elif mask == "slopes":
        seen, options["alibi_slopes"] = torch.ones(keys, dtype=torch.bool), torch.tensor([0.1, 0.0], device=device)
    elif mask == "infinite slopes":
        seen = torch.arange(keys) == keys - queries + 1
        options["alibi_slopes"] = torch.tensor([torch.inf, torch.inf], device=device)
    elif mask != "none":
        options["key_mask"] = seen.to(device).unsqueeze(0)
    sign = torch.where(seen if mask != "none" else torch.ones(keys, dtype=torch.bool), -1.0, 1.0).to(device)
    key = sign[:, None] * (key.abs() + 0.1) * 1e10
    query = query * 1e-10
    query[:, :, 1] = 1e30
    return Case(query, key, value, options=options)


@pytest.mark.parametrize(("mask", "queries"), [*((mask, 2) for mask in OVERFLOWING), ("key mask", 20), ("slopes", 20)])
def test_scores_that_are_all_minus_inf_spoil_their_row(backend, mask, queries):
    """Hidden keys have -inf as well: a row that sees keys is not taken for one that sees none. By tiles, decoding, with
    keys in 8 bits, and by the specification."""
    case = overflowing(mask, queries, backend.device)
    harmless = case.query.clone()
    harmless[:, :, 1] = 0.0
    expected = torch.arange(queries, device=backend.device).expand(2, -1) == 1
    for impl in (backend.impl, "reference"):
        clean = attend(replace(case, query=harmless), impl)
        check_spoiled(case, clean, expected, impl)
        check_spoiled(replace(case, query=case.query.clone().requires_grad_()), clean, expected, impl)
    if queries == 2:
        for skips_blocks in (False, True):
            summaries = KeySummaries.of(case.key, skips_blocks=skips_blocks, impl=backend.impl)
            output = decode(case, backend.impl, summaries)[0]
            assert torch.equal(output.isnan().all(-1), expected)
            assert_unchanged(output[~expected], clean[0][~expected])


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_score_of_minus_inf_beside_finite_ones_is_probability_zero(backend, is_masked):
    query, key, value = iid_inputs(1, 1, 20, 16, key_length=70, device=backend.device)
    query = query.abs() + 0.1
    key[:, :, 50] = -1e38
    mask = {"key_mask": (torch.arange(70, device=backend.device) % 3 > 0)[None]} if is_masked else {}
    case = Case(100 * query, key, value, scale=0.0025, options=mask)
    for impl in (backend.impl, "reference"):
        output = attend(case, impl)
        key[:, :, 50] = -1e30
        torch.testing.assert_close(output, attend(case, impl), rtol=1e-4, atol=1e-5)
        key[:, :, 50] = -1e38


@each_bad
@each_mask
def test_a_bad_value_spoils_the_rows_that_attend_to_it(backend, bad, is_causal):
    """Rows with positive probability on the key are NaN or inf. Other rows may be either, since 0 times NaN is NaN in
    the product of a tile, but for those in whose tiles no row sees the key (tiles have at most 64 queries)."""
    query, key, value = iid_inputs(1, 1, 110, 16, device=backend.device)
    case = Case(query, key, value, is_causal=is_causal, scale=0.05)
    clean = attend(case, backend.impl)
    exact = case.in_float64()
    one_hot = torch.zeros_like(exact.value)
    one_hot[0, 0, 100] = 1.0
    attends = (
        attend(Case(exact.query, exact.key, one_hot, is_causal=is_causal, scale=0.05), "reference")[0, 0, :, 0] > 1e-4
    )
    case.value[0, 0, 100] = bad
    output = attend(case, backend.impl)[0, 0]
    assert attends.any()
    assert not output[attends].isfinite().any()
    if is_causal:
        assert_unchanged(output[:64], clean[0, 0, :64])


@each_bad
@pytest.mark.parametrize("where", ["query", "key", "value", "grad_output"])
def test_gradients_of_bad_inputs_end_and_spare_the_other_tiles(backend, bad, where):
    """Nothing hangs; a bad token leaves the query gradients of the tiles before it, which do not see it, as they were,
    and a bad query or incoming gradient that of every other query."""
    query, key, value = iid_inputs(1, 1, 110, 16, device=backend.device)
    case = Case(query, key, value, is_causal=True)
    grad_output = case.grad_output()
    clean = run(case, backend.impl, grad_output)
    tensor = grad_output if where == "grad_output" else getattr(case, where)
    tensor[0, 0, 100, 3] = bad
    result = run(case, backend.impl, grad_output)
    torch.testing.assert_close(result.gradients[0][:, :, :64], clean.gradients[0][:, :, :64], rtol=1e-4, atol=1e-5)
    if where == "grad_output":
        assert torch.equal(result.output, clean.output)
    if where in ("query", "grad_output"):
        others = torch.arange(110) != 100
        assert_unchanged(result.gradients[0][:, :, others], clean.gradients[0][:, :, others])
        assert not result.gradients[0][0, 0, 100].isfinite().all()


def test_poison_reaches_every_way_to_allocate(backend):
    """The tool itself: without this, the tests below would pass whatever the code leaves unwritten."""
    like = torch.zeros(3, device=backend.device)
    whole = torch.zeros(3, dtype=torch.int32, device=backend.device)
    makers = (
        lambda t: torch.empty(5, dtype=t.dtype, device=t.device),
        torch.empty_like,
        lambda t: torch.empty_strided((2, 2), (1, 2), dtype=t.dtype, device=t.device),
        lambda t: t.new_empty(4),
        lambda t: t.new_empty_strided((2, 2), (2, 1)),
        lambda t: torch.empty_permuted((2, 3), (1, 0), dtype=t.dtype, device=t.device),
    )
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        for make in makers:
            assert make(like).isnan().all()
            assert make(like.half()).isnan().all()
            assert (make(whole) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_poison_shows_in_a_result_that_is_not_written(backend):
    @torch.library.custom_op("flash_entmax_tests::forgets_the_last", mutates_args=())
    def forgets_the_last(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:-1] = x[:-1]
        return out

    with poisoned():
        assert forgets_the_last(torch.zeros(4, device=backend.device)).isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
@pytest.mark.parametrize(("queries", "keys"), [(40, 130), (70, 40), (1, 65), (64, 64)])
@each_mask
def test_nothing_is_read_before_it_is_written(backend, alpha, queries, keys, is_causal):
    query, key, value = iid_inputs(1, 2, queries, 24, key_length=keys, key_heads=1, device=backend.device)
    with poisoned():
        case = Case(query, key, value, alpha=alpha, is_causal=is_causal)
        poison = run(case, backend.impl, case.grad_output())
        assert all(tensor.isfinite().all() for tensor in poison.tensors)
        check_attention(case, backend.impl)


def test_nothing_is_read_before_it_is_written_where_tiles_are_dead(backend):
    length = backend.sizes(128, 1000, 4096)
    with poisoned():
        tensors = topic_inputs(1, 1, length, 32, 4, device=backend.device)
        check_attention(Case(*tensors, is_causal=True), backend.impl)


@pytest.mark.parametrize("outside", ["query", "key", "value"])
@each_mask
def test_memory_past_the_end_of_a_tensor_does_not_matter(backend, outside, is_causal):
    """The inputs are slices of larger tensors that hold NaN everywhere else: in rows, columns and heads."""
    query, key, value = iid_inputs(1, 2, 40, 20, key_length=70, device=backend.device)
    expected = run(Case(query, key, value, is_causal=is_causal), backend.impl, torch.ones_like(query))

    def surrounded(tensor):
        whole = tensor.new_full(
            [extent + more for extent, more in zip(tensor.shape, (2, 2, 70, 20), strict=True)], torch.nan
        )
        inner = whole[tuple(slice(1, 1 + extent) for extent in tensor.shape)]
        return inner.copy_(tensor)

    tensors = {"query": query, "key": key, "value": value}
    tensors[outside] = surrounded(tensors[outside])
    actual = run(Case(**tensors, is_causal=is_causal), backend.impl, torch.ones_like(query))
    for ours, theirs in zip(actual.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# What AdaSplash-2's package (adasplash 0.2.2) gets wrong or refuses


@pytest.mark.parametrize("distribution", ["all equal", "nearly equal"])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_flat_rows_sum_to_one(backend, distribution, alpha):
    """An untrained layer: there, rows sum to 4 at 16,384 keys and to 14 at 65,536."""
    for length in backend.sizes((1000,), (16384, 65536), (16384, 65536)):
        z = score_rows(distribution, length, dtype=torch.float32, device=backend.device)
        check_row_sums(z, alpha, backend.impl)


def test_scores_all_below_minus_1000(backend):
    z = score_rows("all below -1000", 500, rows=3, dtype=torch.float32, device=backend.device)
    check_row_sums(z, 1.5, backend.impl)
    check_row_sums(3 * z, 1.5, backend.impl)


def test_a_query_without_a_key(backend):
    query, key, value = iid_inputs(1, 1, 10, 16, key_length=4, device=backend.device)
    result = check_attention(Case(query, key, value, is_causal=True), backend.impl)
    assert (result.output[:, :, :6] == 0).all()
    assert all(tensor.isfinite().all() for tensor in result.tensors)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100, 127, 129])
@each_mask
def test_short_lengths_and_lengths_that_are_no_power_of_two(backend, length, is_causal):
    tensors = iid_inputs(1, 1, length, 32, device=backend.device)
    check_attention(Case(*tensors, is_causal=is_causal), backend.impl)


@pytest.mark.parametrize("dim", [32, 128])
def test_backward_sees_the_scores_of_the_forward(backend, dim):
    """There, q and k are scaled in different kernels, and in 16 bits head sizes that are no power of 4 differ.

    Scores of size 30 with a few keys near the top: rounding a scaled query would move them by up to 0.1.
    """
    for dtype in backend.dtypes[-2:]:
        query, key, value = iid_inputs(1, 1, 100, dim, dtype=dtype, device=backend.device)
        check_attention(Case(query, key, value, scale=4 * dim**-0.5), backend.impl)


@settings(max_examples=10)
@given(st.integers(1, 130), st.integers(1, 130))
def test_transformers_layout(length, dim):
    """(batch, length, heads, dim) storage seen through transpose(1, 2), as Transformers passes it."""
    for impl in ("torch", "reference"):
        tensors = [t.transpose(1, 2) for t in iid_inputs(1, length, 2, dim)]
        copies = [t.contiguous() for t in tensors]
        actual = entmax_attention(*tensors, is_causal=True, impl=impl)
        torch.testing.assert_close(actual, entmax_attention(*copies, is_causal=True, impl=impl), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [1100, 5000, 9000, -5000])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_scores_far_from_zero(backend, base, alpha):
    """z = base + U[0, 4] exactly, in every dtype: coarse and fine parts of a score in dimensions of their own."""
    generator = torch.Generator().manual_seed(base % 97)
    for length in (31, 200):
        z = base + torch.rand(8, length, generator=generator).mul(16).round() / 4
        coarse = (z / 64).floor() * 64
        query = torch.eye(8).repeat(1, 2)[None, None]
        key = 2 * torch.cat([coarse, z - coarse])[None, None].mT
        value = torch.randn(1, 1, length, 16, generator=generator)
        for dtype in backend.dtypes:
            tensors = (t.to(backend.device, dtype) for t in (query, key, value))
            check_attention(Case(*tensors, alpha=alpha, scale=0.5 / (alpha - 1)), backend.impl)


def rows_next_to_the_threshold(rows: int, length: int) -> torch.Tensor:
    """z whose threshold for alpha = 2 is known: few keys above it, some of them barely, and a dozen barely below it."""
    generator = torch.Generator().manual_seed(3)
    fine = 2.0**-20
    z = torch.full((rows, length), -1.5, dtype=torch.float64)
    for row in z:
        share = torch.rand(4, generator=generator, dtype=torch.float64)
        above = (share / share.sum() * (1 - 2.0**-12) / fine).round() * fine
        above = torch.cat([above, above.new_tensor([2.0**-12])])
        above[0] += 1 - above.sum()
        below = -(2.0**-15) * torch.arange(1, 13)
        place = torch.randperm(length, generator=generator)[:17]
        row[place] = torch.cat([above, below]) - above.max()
    return z


@pytest.mark.parametrize("is_learned", [False, True])
def test_keys_next_to_the_threshold_are_told_apart(backend, is_learned):
    """For alpha above 1.5 the gradient jumps where a key enters the support; scores here are exact in every dtype."""
    z = rows_next_to_the_threshold(32, 200)
    coarse = (z * 2**7).floor() / 2**7
    middle = ((z - coarse) * 2**14).floor() / 2**14
    parts = (coarse, middle, z - coarse - middle)
    query, key = torch.eye(32).repeat(1, 3)[None, None], 2 * torch.cat(parts)[None, None].mT
    value = torch.randn(1, 1, 200, 16, generator=torch.Generator().manual_seed(1))
    alpha = torch.tensor(2.0, device=backend.device) if is_learned else 2.0
    for dtype in backend.dtypes:
        tensors = (t.to(backend.device, dtype) for t in (query, key, value))
        check_attention(Case(*tensors, alpha=alpha, scale=0.5), backend.impl)


@pytest.mark.parametrize(
    ("alpha", "is_learned", "depth", "spread"),
    [(1.45, False, -0.0025, 0.01), (1.5, False, -0.001, 0.004), (1.5, True, -0.001, 0.004)],
)
def test_a_crowd_of_keys_at_the_threshold(backend, alpha, is_learned, depth, spread):
    """At an offset a little too large all of them seem to be attended to: hardly any probability, but most of sum u."""
    for dtype in backend.dtypes:
        if dtype != torch.bfloat16:  # which does not hold these scores
            case = crowd(alpha, depth, spread, dtype, backend.device)
            if is_learned:
                case = replace(case, alpha=torch.tensor(alpha, device=backend.device))
            check_attention(case, backend.impl)


@pytest.mark.parametrize("scale", [1e6, 1e14, 1e24])
def test_scores_of_any_size_give_finite_rows(backend, scale):
    """Up to 1e28 in magnitude: each query attends to its best key, or to equal ones."""
    query, key, value = (
        torch.rand(1, 1, 128, 16, generator=torch.Generator().manual_seed(7)).to(backend.device) * size
        for size in (100.0, 100.0, 1.0)
    )
    for dtype in backend.dtypes:
        case = Case(query.to(dtype), key.to(dtype), value.to(dtype), scale=scale)
        output, exact = attend(case, backend.impl), attend(case.in_float64(), "reference")
        tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
        torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


def test_small_keys_are_not_taken_for_points(backend):
    """Squares of such components underflow in float32; the best key lies in the block of the lower mean."""
    query, key = torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16)
    query[..., 0] = 1.0
    key[:, :, :64, 0] = 50e-25
    key[:, :, 64:, 0] = torch.tensor([100e-25, -100e-25]).repeat(32)
    value = iid_inputs(1, 1, 128, 16)[2]
    tensors = (t.to(backend.device) for t in (query, key, value))
    check_attention(Case(*tensors, scale=2e25), backend.impl)
