"""Decoding in plain PyTorch: which calls take the path, what a row's result depends on, and faults that must show."""

from dataclasses import replace

import pytest
import test_decode
import torch
from cases import attend
from decoding import OPTIONS, TORCH, case_with, check_decode, torch_case
from mutants import Mutant, plant

from flash_entmax.backends.torch import attention, decode, output
from flash_entmax.core import threshold
from flash_entmax.core.call import MOST_DECODED


@pytest.fixture
def decoded(monkeypatch):
    """How many calls took the path, as a list."""
    calls = []

    def recorded(*arguments):
        calls.append(arguments)
        return decode.decode(*arguments)

    monkeypatch.setattr(attention, "decode", recorded)
    return calls


@pytest.mark.parametrize("queries", [1, 16, 17])
def test_calls_of_few_queries_decode(decoded, queries):
    attend(torch_case(queries), "torch")
    assert bool(decoded) == (queries <= MOST_DECODED == 16)


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
    test_decode.test_dense_and_sparse_rows_in_one_call(TORCH)
    test_a_bad_value_reaches_no_other_row()
    test_a_bad_value_reaches_no_row_without_keys()
    test_decode.test_a_bad_query_spoils_its_row(TORCH, torch.nan)
    test_decode.test_long_crowds_to_the_last_digits(TORCH, 2.0)


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
