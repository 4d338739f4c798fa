"""Decoding: few queries against many keys, without gradients, under the budgets of every other call."""

import pytest
import torch
from cases import Case, attend, crowd, packed_case
from checks import operator_arguments
from decoding import OPTIONS, case_with, check_decode, few_queries

from flash_entmax.operators import attention as ops
from flash_entmax.testing import DISTRIBUTIONS, decoding_inputs, inputs_with_scores, poisoned, score_rows

QUERIES = 1, 2, 5, 16
HEADS = (2, 2), (4, 2), (4, 1), (3, 3), (6, 3)  # query heads, key heads


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("queries", QUERIES)
def test_queries_and_groups(backend, queries, heads):
    check_decode(few_queries(backend, queries, heads=heads[0], key_heads=heads[1], batch=2), backend.impl)


@pytest.mark.parametrize("dim", [16, 144])
def test_more_rows_than_a_tile(backend, dim):
    """75 queries share each key head: the last tile of them is not full. Heads over 128 have smaller tiles."""
    options = {"heads": 10, "key_heads": 2, "dim": dim, "is_causal": True}
    check_decode(few_queries(backend, 15, 70, **options), backend.impl)


@pytest.mark.parametrize("keys", [1, 2, 16, 63, 64, 65, 127, 128, 129, 200])
def test_numbers_of_keys(backend, keys):
    for queries in (1, 5):
        check_decode(few_queries(backend, queries, keys, is_causal=queries > 1), backend.impl)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 70), (64, 64), (80, 40), (256, 16)])
def test_head_sizes(backend, sizes):
    check_decode(few_queries(backend, dim=sizes[0], value_dim=sizes[1]), backend.impl)


@pytest.mark.parametrize("alpha", [1.01, 1.1, 4 / 3, 1.5, 1.75, 2.0])
def test_alphas(backend, alpha):
    for queries in (1, 5):
        check_decode(few_queries(backend, queries, alpha=alpha), backend.impl)


def test_dtypes(backend):
    for dtype in backend.dtypes:
        for heads in ((2, 2), (4, 1)):
            check_decode(few_queries(backend, 3, heads=heads[0], key_heads=heads[1], dtype=dtype), backend.impl)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name):
    check_decode(case_with(backend, name), backend.impl)


def test_rows_without_keys_are_zero(backend):
    assert (attend(case_with(backend, "no key"), backend.impl) == 0).all()
    result = attend(case_with(backend, "a row without keys"), backend.impl)
    assert (result[1] == 0).all()
    assert (result[0] != 0).any(-1).all()


def test_packed_sequences(backend):
    check_decode(packed_case(backend, (1, 0, 3, 1), (70, 5, 40, 1), spare=2, is_causal=True), backend.impl)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_dense_and_sparse_supports(backend, distribution, alpha):
    z = score_rows(distribution, backend.sizes(200, 2000, 2000), rows=3).to(backend.device, torch.float32)
    query, key, scale = inputs_with_scores(z, alpha)
    value = few_queries(backend, keys=z.shape[1], heads=1).value
    check_decode(Case(query, key, value, alpha=alpha, scale=scale), backend.impl)


def test_dense_and_sparse_rows_in_one_call(backend):
    """The rows of one key head: of equal scores, of one key far above, of some hundred keys."""
    keys = backend.sizes(200, 3000, 3000)
    z = torch.cat([score_rows(name, keys) for name in ("all equal", "very peaked", "gaussian 0.1", "all equal")])
    query, key, scale = inputs_with_scores(z.to(backend.device, torch.float32), 1.5)
    value = few_queries(backend, keys=keys, heads=1).value
    check_decode(Case(query, key, value, scale=scale), backend.impl)


@pytest.mark.parametrize(("alpha", "depth", "spread"), [(1.45, -0.0025, 0.01), (1.5, -0.001, 0.004)])
def test_crowds_just_above_the_threshold(backend, alpha, depth, spread):
    """A small step of the offset moves many small probabilities: the last step is made on the output."""
    check_decode(crowd(alpha, depth, spread, torch.float32, backend.device), backend.impl)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_long_crowds_to_the_last_digits(backend, alpha):
    """For alpha = 2, F moves by the number of keys times the last bit of an offset: dense float32 is off by that."""
    keys = backend.sizes(2048, 65536, 131072)
    z = score_rows("one maximum over a crowd", keys, rows=2).to(backend.device, torch.float32)
    query, key, scale = inputs_with_scores(z, alpha)
    value = few_queries(backend, keys=keys, heads=1).value
    value[..., 0] = 1.0
    case = Case(query, key, value, alpha=alpha, scale=scale)
    exact = attend(case.in_float64(), "reference").float()
    torch.testing.assert_close(attend(case, backend.impl), exact, rtol=0, atol=1e-5)


def test_decoding_inputs_have_their_supports(backend):
    sizes = {"batch": 1, "heads": 4, "key_length": backend.sizes(512, 4096, 4096), "dim": 32, "key_heads": 2}
    case = Case(*decoding_inputs(**sizes, queries=2, device=backend.device))
    check_decode(case, backend.impl)
    size = attend(case, "reference", return_support=True)[1].size
    assert 10 <= size.min() <= size.max() <= 400


def test_the_operator_keeps_its_schema(backend):
    arguments = operator_arguments(case_with(backend, "key mask, window"), backend.impl)
    assert arguments[3] is False
    torch.library.opcheck(ops.attention, arguments)


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides(backend, dtype):
    case = case_with(backend, "causal", dtype=dtype)
    expected = attend(case, backend.impl)

    def rows_first(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def spread(tensor):
        return torch.stack((tensor, tensor), -1)[..., 0]

    for stored in (rows_first, spread):
        key, value = stored(case.key), stored(case.value)
        assert key.stride() != case.key.stride()
        torch.testing.assert_close(attend(case.with_tensors(key=key, value=value), backend.impl), expected)
    shared = case.with_tensors(key=case.key[:1].expand(2, -1, -1, -1), value=case.value[:1].expand(2, -1, -1, -1))
    check_decode(shared, backend.impl)


def test_unwritten_memory_reaches_no_output(backend):
    for name in ("causal", "together"):
        case = case_with(backend, name)
        expected = attend(case, backend.impl)
        with poisoned():
            assert torch.equal(attend(case, backend.impl), expected)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
def test_calls_without_elements(backend, sizes):
    batch, heads, queries, keys = sizes
    result = attend(few_queries(backend, queries, keys, batch=batch, heads=heads, key_heads=heads), backend.impl)
    assert result.shape == (batch, heads, queries, 8)
    assert (result == 0).all()


# NaN and infinity


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_spoils_its_row(backend, bad):
    case = few_queries(backend, 5)
    case.query, case.key = case.query.abs() + 0.1, case.key.abs() + 0.1
    clean = attend(case, backend.impl)
    case.query[0, 1, 3, 2] = bad
    spoiled = attend(case, backend.impl)
    assert spoiled[0, 1, 3].isnan().all()
    spoiled[0, 1, 3] = clean[0, 1, 3]
    torch.testing.assert_close(spoiled, clean, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_key_spoils_the_rows_that_see_it(backend, bad):
    case = few_queries(backend, 5, 130, heads=4, key_heads=2, is_causal=True)
    case.query, case.key = case.query.abs() + 0.1, case.key.abs() + 0.1
    clean = attend(case, backend.impl)
    case.key[0, 1, 127, 2] = bad
    spoiled = attend(case, backend.impl)
    assert spoiled[0, 2:, 2:].isnan().all()
    torch.testing.assert_close(spoiled[:, :2], clean[:, :2], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(spoiled[:, 2:, :2], clean[:, 2:, :2], rtol=1e-5, atol=2e-6)


def test_a_bad_value_reaches_the_rows_that_attend_to_it(backend):
    case = few_queries(backend, 5, 130, heads=1)
    unit = torch.eye(case.key.shape[2], device=backend.device).expand(1, 1, -1, -1)
    p = attend(case.with_tensors(value=unit), "reference")
    key = p[0, 0, 2].argmax()
    case.value[0, 0, key] = torch.nan
    attends = p[0, 0, :, key] > 0
    assert attend(case, backend.impl)[0, 0, attends].isnan().all()
