"""Decoding: few queries against many keys, without gradients, under the budgets of every other call."""

from dataclasses import replace

import pytest
import torch
from cases import Case, attend, crowd, make_case, packed_case, run_dense
from checks import PAIRS, check_layout, operator_arguments
from mutants import Mutant, plant
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax.backends.torch import attention, decode, output
from flash_entmax.core import threshold
from flash_entmax.operators import attention as ops
from flash_entmax.testing import (
    DISTRIBUTIONS,
    assert_within_budget,
    decoding_inputs,
    inputs_with_scores,
    poisoned,
    score_rows,
)

QUERIES = 1, 2, 5, 16
HEADS = (2, 2), (4, 2), (4, 1), (3, 3), (6, 3)  # query heads, key heads


def check_decode(case: Case, impl: str) -> torch.Tensor:
    """The output without gradients against the float64 reference."""
    actual = attend(case, impl)
    exact = attend(case.in_float64(), "reference")
    dense = run_dense(case, case.grad_output()).output
    size = case.value.double().abs().amax().item() if case.value.numel() else 0.0
    assert actual.dtype == case.query.dtype
    check_layout(case, actual)
    assert_within_budget(actual, exact, dense, name="output", magnitude=size)
    return actual


def few_queries(backend, queries=2, keys=None, **options) -> Case:
    keys = backend.sizes(130, 700, 700) if keys is None else keys
    return make_case(backend, length=queries, key_length=keys, **{"value_dim": 8, **options})


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("queries", QUERIES)
def test_queries_and_groups(backend, queries, heads):
    check_decode(few_queries(backend, queries, heads=heads[0], key_heads=heads[1], batch=2), backend.impl)


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


def sees(batch, head, query, key):
    return (key + query + head) % 3 > 0


def options_of(name: str, device: str, keys: int) -> dict:
    """Of calls of 2 batch rows, 4 heads and 5 queries."""

    def numbers(*values):
        return torch.tensor(values, device=device)

    return {
        "causal": lambda: {"is_causal": True},
        "window": lambda: {"window_size": (70, 3)},
        "window, causal": lambda: {"window_size": (10, -1), "is_causal": True},
        "first position": lambda: {"query_positions": 40, "is_causal": True},
        "positions": lambda: {"query_positions": numbers(90, 3, 64, 0, 127), "window_size": (40, 2)},
        "positions of batch rows": lambda: {
            "query_positions": numbers((90, 3, 64, 0, 9), (5, 6, 7, 8, -1)), "is_causal": True,
        },
        "key lengths": lambda: {"key_lengths": numbers(keys - 3, 17)},
        "a row without keys": lambda: {"key_lengths": numbers(keys, 0), "is_causal": True},
        "left padding": lambda: {"key_mask": torch.arange(keys, device=device) >= numbers(70, 3).unsqueeze(-1)},
        "key mask": lambda: {"key_mask": torch.arange(2 * keys, device=device).view(2, keys) % 7 % 2 > 0},
        "key mask, window": lambda: {
            "key_mask": torch.arange(2 * keys, device=device).view(2, keys) % 7 % 2 > 0, "window_size": (20, 2),
        },
        "no key": lambda: {"key_mask": torch.zeros(2, keys, dtype=torch.bool, device=device)},
        "block mask": lambda: {"block_mask": create_block_mask(sees, None, 4, 5, keys, device=device)},
        "softcap": lambda: {"softcap": 1.0, "scale": 1.0},
        "ALiBi": lambda: {"alibi_slopes": numbers(0.1, 0.01, 0.0, -0.02)},
        "infinite ALiBi": lambda: {"alibi_slopes": numbers(torch.inf, 0.1, torch.inf, 0.0), "is_causal": True},
        "ALiBi of batch rows": lambda: {
            "alibi_slopes": numbers((0.1, 0.2, 0.3, 0.4), (0.0, -0.01, torch.inf, 1.0)), "window_size": (30, 30),
        },
        "learned": lambda: {name: numbers(*pair * 2) for name, pair in PAIRS.items()},
        "together": lambda: {
            "alpha": numbers(1.2, 1.5, 1.7, 2.0), "softcap": 2.0, "alibi_slopes": numbers(0.1, torch.inf, 0.0, -0.01),
            "window_size": (100, 0), "key_lengths": numbers(keys - 1, 90),
            "key_mask": torch.arange(2 * keys, device=device).view(2, keys) % 5 > 0,
        },
    }[name]()  # fmt: skip


OPTIONS = (
    "causal", "window", "window, causal", "first position", "positions", "positions of batch rows", "key lengths",
    "a row without keys", "left padding", "key mask", "key mask, window", "no key", "block mask", "softcap", "ALiBi",
    "infinite ALiBi", "ALiBi of batch rows", "learned", "together",
)  # fmt: skip


def case_with(backend, name: str, **more) -> Case:
    options = options_of(name, backend.device, 130)
    return few_queries(backend, 5, 130, **{"batch": 2, "heads": 4, "key_heads": 2, **options, **more})


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


@pytest.mark.parametrize("name", ["key mask, window", "together"])
def test_the_operator_keeps_its_schema(backend, name):
    arguments = operator_arguments(case_with(backend, name), backend.impl)
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
    for name in ("causal", "key mask", "together"):
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


# Plain PyTorch: which calls decode, and what a row's result depends on


@pytest.fixture
def decoded(monkeypatch):
    """How many calls took the path, as a list."""
    calls = []

    def recorded(*arguments):
        calls.append(arguments)
        return decode.decode(*arguments)

    monkeypatch.setattr(attention, "decode", recorded)
    return calls


def torch_case(queries=2, keys=700, **options) -> Case:
    return few_queries(TORCH, queries, keys, **options)


class Torch:
    """The backend without the fixture."""

    impl, device = "torch", "cpu"

    def sizes(self, interpreter, processor, cuda):
        return processor


TORCH = Torch()


@pytest.mark.parametrize("queries", [1, 16, 17])
def test_calls_of_few_queries_decode(decoded, queries):
    attend(torch_case(queries), "torch")
    assert bool(decoded) == (queries <= decode.MAX_QUERIES == 16)


def test_calls_with_gradients_or_a_support_do_not_decode(decoded):
    case = torch_case()
    attend(case.with_tensors(**case.leaves()), "torch")
    attend(case, "torch", return_support=True)
    assert not decoded


def test_a_bad_value_reaches_no_other_row():
    """Neither the keys of other rows, nor those that are certified away too late, nor what fills the lists."""
    case = torch_case(5, 500, heads=1)
    unit = torch.eye(500).expand(1, 1, -1, -1)
    p = attend(case.with_tensors(value=unit), "torch")[0, 0]
    case.value[0, 0, (p[0] == 0) & (torch.arange(500) % 2 == 0)] = torch.nan
    result = attend(case, "torch")[0, 0]
    assert not result[0].isnan().any()
    assert result[1:].isnan().any(-1).any()


def test_a_bad_value_reaches_no_row_without_keys():
    case = case_with(TORCH, "a row without keys")
    case.value[1] = torch.nan
    assert (attend(case, "torch")[1] == 0).all()
    case = case_with(TORCH, "positions")
    case.value[:, :, 0] = torch.nan
    case.options["query_positions"][0] = -200
    assert (attend(case, "torch")[:, :, 0] == 0).all()


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("queries", [1, 2, 16])
def test_a_row_does_not_depend_on_the_rest_of_its_batch(queries, heads, alpha):
    """To the bit, where no power is rounded otherwise elsewhere in memory, and a batch row has several key heads."""
    for name in ("none", "key lengths", "key mask"):
        case = torch_case(queries, 900, batch=3, heads=heads[0], key_heads=heads[1], alpha=alpha)
        case.query *= torch.tensor([1.0, 0.0, 5.0])[:, None, None, None]
        if name == "key lengths":
            case.options["key_lengths"] = torch.tensor([900, 300, 5])
        if name == "key mask":
            case.options["key_mask"] = torch.arange(2700).view(3, 900) % 7 % 2 > 0
        together = attend(case, "torch")
        assert torch.equal(together, attend(case, "torch"))
        for row in range(3):
            own = {option: tensor[row : row + 1] for option, tensor in case.options.items()}
            tensors = (tensor[row : row + 1] for tensor in (case.query, case.key, case.value))
            alone = replace(case, options=own)
            alone.query, alone.key, alone.value = tensors
            assert torch.equal(attend(alone, "torch")[0], together[row])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 2 * 5 * 130, 4 * 5 * 130])
def test_parts_by_size_give_the_same(monkeypatch, name, chunk):
    """A key head at a time, a batch row at a time."""
    case = case_with(TORCH, name)
    expected = attend(case, "torch")
    monkeypatch.setattr(decode, "CHUNK_SCORES", chunk)
    torch.testing.assert_close(attend(case, "torch"), expected, rtol=1e-5, atol=1e-6)


def test_keys_in_16_bits_are_converted_some_at_a_time(monkeypatch):
    case = torch_case(dtype=torch.bfloat16)
    expected = attend(case, "torch")
    monkeypatch.setattr(decode, "CHUNK_SCORES", 2**12)
    torch.testing.assert_close(attend(case, "torch"), expected)


def test_values_are_gathered_some_rows_at_a_time(monkeypatch):
    case = torch_case(16)
    expected = attend(case, "torch")
    monkeypatch.setattr(decode, "GATHERED", 1000)
    torch.testing.assert_close(attend(case, "torch"), expected, rtol=1e-6, atol=1e-7)


# Deliberate faults


def check_everything() -> None:
    for alpha in (1.3, 1.5, 2.0):
        check_decode(torch_case(3, heads=4, key_heads=2, batch=2, alpha=alpha), "torch")
    for name in OPTIONS:
        check_decode(case_with(TORCH, name), "torch")
    test_dense_and_sparse_rows_in_one_call(TORCH)
    test_a_bad_value_reaches_no_other_row()
    test_a_bad_value_reaches_no_row_without_keys()
    test_a_bad_query_spoils_its_row(TORCH, torch.nan)
    test_long_crowds_to_the_last_digits(TORCH, 2.0)


FAULTS = {
    "the last step on the output is left out": (output, "outputs", "(1 - p.sum(-1, keepdim=True)) * mean", "0 * mean"),
    "u is p in the output": (output, "outputs", "support_weight(...)", "probability(...)"),
    "one step of the solve": (threshold, "solve", "MAX_STEPS", "1"),
    "the certificate is too small": (threshold, "certified_offset", "return ...", "return 0.7 * ..."),
    "no key is hidden": (decode, "hide", "z.masked_fill_(...)", "z"),
    "the filter by tiles is left out": (decode, "seen_by_tiles", "return ...", "return (...) | True"),
    "the filter is that of the first key on": (
        decode, "hide", "seen = seen & ...",
        "seen = seen & seen_by_tiles(problem, start, stop, position)[Ellipsis, :z.shape[-1]]",
    ),
    "ALiBi is left out": (decode, "hide", "z.sub_(...)", "z"),
    "calls see all keys": (decode, "sees_all_keys", "return ...", "return True"),
    "causal calls see all keys": (
        decode, "sees_all_keys", "visibility.is_causal and problem.query_length > 1", "False",
    ),
    "values start at the first key of all": (decode, "decode_part", "value[:, :, first:end]", "value"),
    "all heads read the values of the first": (
        decode, "rows_of_values", "head // problem.group * value.stride(1)", "0",
    ),
    "a key above the threshold is not listed": (
        decode, "listed_keys", "block_maxima > cut", "block_maxima > cut + 0.1",
    ),
    "keys of other blocks are listed": (decode, "listed_keys", "place % BLOCK", "0 * place"),
    "dense rows are not solved": (decode, "write_dense_outputs", "solve(...)", "high"),
    "dense rows are not written": (decode, "write_dense_outputs", "torch.where(...)", "output[unit]"),
    "all rows of a key head are written as dense": (decode, "write_dense_outputs", "torch.where(...)", "dense"),
    "what fills the lists is read": (
        decode, "outputs_of_lists", "torch.where(listed.relative + offset > 0, listed.key, largest)", "listed.key",
    ),
    "rows with NaN keep their offset": (decode, "certified_rows", "high.masked_fill_(...)", "high"),
    "rows without keys get a value": (
        decode, "decode_part", "output.masked_fill_((visible == 0).unsqueeze(-1), 0.0)", "output",
    ),
}  # fmt: skip


def test_checks_pass_without_a_fault():
    check_everything()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    plant(Mutant(*FAULTS[fault]), monkeypatch, tmp_path)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_everything()
