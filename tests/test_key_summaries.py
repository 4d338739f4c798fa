"""Decoding by KeySummaries: keys in 8 bits beside a cache, and the same results as without."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from cases import attend
from decoded_by_summaries import (
    blocks_apart,
    blocks_side_by_side,
    check,
    decode,
    few_queries,
    keys_of_whole_numbers,
    near_ties,
    sparse,
    support_in_a_wide_block,
)

from flash_entmax import KeySummaries, entmax_attention
from flash_entmax.testing import poisoned

# Results are those of the specification


def test_summaries_made_under_inference_mode_grow_under_no_grad(backend):
    query, key, value = (torch.randn(1, 1, length, 16, device=backend.device) for length in (1, 70, 70))
    with torch.inference_mode():
        summaries = KeySummaries(1, 1, 70, 16, dtype=key.dtype, device=key.device, skips_blocks=True, impl=backend.impl)
        summaries.append(key[:, :, :64])
    summaries.append(key[:, :, 64:])
    with torch.no_grad():
        output = entmax_attention(query, key, value, key_summary=summaries, impl=backend.impl)
        torch.testing.assert_close(output, entmax_attention(query, key, value, impl=backend.impl))


@pytest.mark.parametrize("queries", [1, 3, 16])
def test_queries_and_groups(backend, queries):
    for heads, key_heads in ((2, 2), (4, 1)) if queries < 16 else ((2, 1),):
        check(few_queries(backend, queries, heads=heads, key_heads=key_heads, batch=2), backend.impl)


def test_dtypes(backend):
    for dtype in backend.dtypes[-3:]:
        if dtype != torch.float64:
            check(few_queries(backend, dtype=dtype, dim=40), backend.impl)


@pytest.mark.parametrize("keys", [1, 63, 65, 128])
def test_numbers_of_keys_in_a_longer_cache(backend, keys):
    case = few_queries(backend, keys=keys)
    check(case, backend.impl, KeySummaries.of(case.key, capacity=keys + 100, impl=backend.impl))


@pytest.mark.parametrize("sizes", [(1, 1), (64, 64), (80, 40), (256, 16)])
def test_head_sizes(backend, sizes):
    check(few_queries(backend, 1, dim=sizes[0], value_dim=sizes[1]), backend.impl)


def options_of(name: str, device: str) -> dict:
    """Of calls of 2 batch rows, 4 heads, 5 queries and 130 keys."""

    def numbers(*values):
        return torch.tensor(values, device=device)

    return {
        "causal": {"is_causal": True},
        "window": {"window_size": (70, 3)},
        "key lengths": {"key_lengths": numbers(127, 17)},
        "a row without keys": {"key_lengths": numbers(130, 0)},
        "key mask": {"key_mask": torch.arange(260, device=device).view(2, 130) % 7 % 2 > 0},
        "softcap": {"softcap": 1.0, "scale": 1.0},
        "ALiBi": {"alibi_slopes": numbers(0.1, 0.01, torch.inf, -0.02)},
        "learned": {"alpha": numbers(1.2, 1.5, 1.7, 2.0), "scale": numbers(0.1, 0.2, 0.3, 1.0)},
        "together": {
            "alpha": numbers(1.2, 1.5, 1.7, 2.0), "softcap": 2.0, "alibi_slopes": numbers(0.1, torch.inf, 0.0, -0.01),
            "window_size": (100, 0), "key_mask": torch.arange(260, device=device).view(2, 130) % 5 > 0,
        },
    }[name]  # fmt: skip


OPTIONS = (
    "causal", "window", "key lengths", "a row without keys", "key mask", "softcap", "ALiBi", "learned", "together",
)  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name):
    options = options_of(name, backend.device)
    check(few_queries(backend, 5, 130, batch=2, heads=4, key_heads=2, **options), backend.impl)


@pytest.mark.parametrize("summaries", [True, False])
def test_whole_tiles_that_a_mask_hides(backend, summaries):
    """Beside tiles of which it hides some keys: the first of these has every other key."""
    case = few_queries(backend, 3, 300, batch=2)
    mask = torch.ones(2, 300, dtype=torch.bool, device=backend.device)
    mask[0, 1:64:2], mask[0, 64:256], mask[1] = False, False, False
    case = replace(case, options={"key_mask": mask})
    if summaries:
        check(case, backend.impl)
    with torch.no_grad():
        output = attend(case, backend.impl)
    assert (output[1] == 0).all()
    seen = replace(
        case, key=case.key[:1, :, mask[0]], value=case.value[:1, :, mask[0]], query=case.query[:1], options={}
    )
    torch.testing.assert_close(output[:1], attend(seen, "torch"), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_keys_that_are_nearly_one(backend, alpha):
    case = replace(near_ties(backend), alpha=alpha)
    size = attend(case, "reference", return_support=True)[1].size
    assert size.min() < 150, "no key is out of the support"
    check(case, backend.impl)


def test_keys_of_whole_numbers(backend):
    case = keys_of_whole_numbers(backend)
    assert torch.equal(
        KeySummaries.of(case.key, impl=backend.impl).rounded_keys.rounded[..., :32], case.key.to(torch.int8)
    )
    check(case, backend.impl)


def test_keys_of_very_different_lengths(backend):
    case = few_queries(backend, keys=150)
    lengths = 10.0 ** torch.linspace(-40, 3, 150, device=backend.device)
    check(replace(case, key=(case.key * lengths[:, None]).contiguous()), backend.impl)


@pytest.mark.parametrize("number", [0.0, 1e-29, 1e-20, 1e20])
def test_queries_of_every_length(backend, number):
    case = few_queries(backend)
    scale = 1.0 if number == 0 else 1 / number
    check(replace(case, query=case.query * number, scale=scale), backend.impl)


def test_planted_keys(backend):
    for dtype in (torch.float32, torch.float16):
        check(sparse(backend, dtype)[0], backend.impl)


# What is read


def test_only_keys_that_may_have_support_are_read(backend):
    if backend.impl == "torch":
        pytest.skip("plain PyTorch reads the keys")
    case, near = sparse(backend)
    summaries = KeySummaries.of(case.key, impl=backend.impl)
    expected = decode(case, backend.impl, summaries)
    key, value = (torch.where(near[:, None], own, torch.nan) for own in (case.key, case.value))
    assert torch.equal(decode(replace(case, key=key, value=value), backend.impl, summaries), expected)
    key = torch.where(near[:, None], torch.nan, case.key)
    assert decode(replace(case, key=key), backend.impl, summaries).isnan().all()


def test_blocks_that_are_ruled_out_are_not_read(backend):
    if backend.impl == "torch":
        pytest.skip("plain PyTorch reads all keys")
    case, near = blocks_apart(backend)
    expected = decode(case, backend.impl, KeySummaries.of(case.key, impl=backend.impl))
    bad = replace(case, key=torch.where(near[:, None], case.key, torch.nan))
    for skips_blocks in (True, False):
        summaries = KeySummaries.of(case.key, skips_blocks=skips_blocks, impl=backend.impl)
        summaries.rounded_keys.unit[:, :, ~near] = torch.nan  # who reads it reads the key
        output = decode(bad, backend.impl, summaries)
        assert torch.equal(output, expected) if skips_blocks else output.isnan().all()


def test_blocks_side_by_side(backend):
    check(blocks_side_by_side(backend), backend.impl)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"alibi_slopes": (0.3, -0.2)}, {"softcap": 20.0}])
def test_support_in_a_wide_block(backend, options):
    case = support_in_a_wide_block(backend)
    if "alibi_slopes" in options:
        options = {"alibi_slopes": torch.tensor(options["alibi_slopes"], device=backend.device)}
    check(replace(case, is_causal=options.pop("is_causal", False), options=options), backend.impl)


def test_bounds_of_blocks_hold(backend):
    key = few_queries(backend, keys=140, dim=40).key
    _, _, _, centre, radius, error = KeySummaries.of(key, skips_blocks=True, impl=backend.impl).rounded_keys
    for index, block in enumerate(key.double().split(64, 2)):
        c = centre[:, :, index, :40].double()
        if index == 2:
            assert radius[0, 0, 2] == error[0, 0, 2] == torch.inf  # it is not full
            continue
        assert ((block - c.unsqueeze(2)).norm(dim=-1) <= radius[:, :, index, None]).all()
        assert ((block.mean(2) - c).norm(dim=-1) <= error[:, :, index]).all()
        assert (radius < 10).any()


def test_keys_that_were_not_appended_are_read(backend):
    case = few_queries(backend, keys=200, batch=2)
    summaries = KeySummaries(2, 1, 300, 16, dtype=case.key.dtype, device=backend.device, impl=backend.impl)
    check(case, backend.impl, summaries)
    summaries.append(case.key[:, :, :100])
    check(case, backend.impl, summaries)


def test_nothing_is_read_before_it_is_written(backend):
    case = few_queries(backend, 3, 130, heads=4, key_heads=2)
    with poisoned():
        check(case, backend.impl, KeySummaries.of(case.key, capacity=190, impl=backend.impl))


def test_a_row_does_not_depend_on_the_others(backend):
    case = few_queries(backend, 2, 200, batch=2, heads=4, key_heads=2)
    whole = decode(case, backend.impl, KeySummaries.of(case.key, impl=backend.impl))
    own = replace(case, query=case.query[1:, 2:3, :1], key=case.key[1:, 1:], value=case.value[1:, 1:])
    alone = decode(own, backend.impl, KeySummaries.of(own.key, impl=backend.impl))
    if backend.impl == "triton":
        assert torch.equal(alone, whole[1:, 2:3, :1])


# NaN and infinity


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_key_spoils_the_rows_that_see_it(backend, bad):
    case = few_queries(backend, 2, 130, is_causal=True)
    case.key[0, 0, 129, 3] = bad
    result = decode(case, backend.impl, KeySummaries.of(case.key, impl=backend.impl))
    clean = replace(case, key=case.key.nan_to_num(0.0, 0.0, 0.0))
    expected = attend(case.in_float64(), "reference")
    assert torch.equal(result.isnan().all(-1), expected.isnan().all(-1))
    assert result[:, :, 1].isnan().any()
    exact = attend(clean.in_float64(), "reference")[:, :, 0]
    torch.testing.assert_close(result[:, :, 0].double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_spoils_its_row(backend, bad):
    case = few_queries(backend, 2, 130)
    clean = check(case, backend.impl)
    case.query[0, 1, 0, 2] = bad
    result = decode(case, backend.impl, KeySummaries.of(case.key, impl=backend.impl))
    assert result[0, 1, 0].isnan().all()
    spoiled = torch.zeros_like(result, dtype=torch.bool)
    spoiled[0, 1, 0] = True
    torch.testing.assert_close(result[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("name", ["alpha", "scale", "alibi_slopes"])
@pytest.mark.parametrize("summaries", [True, False])
def test_a_bad_number_of_a_head_spoils_its_rows(backend, name, summaries):
    """Also beside a mask that may hide every key, but not in a row that sees none."""
    numbers = torch.tensor([torch.nan, 1.5], device=backend.device)
    mask = torch.ones(2, 700, dtype=torch.bool, device=backend.device)
    mask[1] = False
    case = few_queries(backend, batch=2)
    given = {"key_summary": KeySummaries.of(case.key, impl=backend.impl)} if summaries else {}
    with torch.no_grad():
        assert attend(case, backend.impl, **{name: numbers}, **given)[:, 0].isnan().all()
        masked = attend(case, backend.impl, **{name: numbers}, key_mask=mask[:, : case.key.shape[2]], **given)
    assert masked[0, 0].isnan().all()
    assert masked[:, 1].isfinite().all()
    assert (masked[1] == 0).all()


def test_scores_that_overflow_spoil_their_rows(backend):
    case = few_queries(backend, 1, 130)
    big = replace(case, query=case.query.abs() * 1e30, key=case.key.abs() * 1e30)
    assert decode(big, backend.impl, KeySummaries.of(big.key, impl=backend.impl)).isnan().all()


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_rows_in_chunks(backend, monkeypatch):
    """As of a cache that is so long that the scores of all rows are too many at a time."""
    from flash_entmax.backends.triton import plan

    case = few_queries(backend, 10, 130, batch=2, heads=4, key_heads=2)
    plan.plan_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(plan, "DECODED", 7 * 160)
        check(case, backend.impl)
    plan.plan_of.cache_clear()
