"""KeySummaries as an object: appended to, reset, reordered, captured and compiled; and what they refuse."""

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from cases import attend
from checks import operator_arguments
from conftest import HAS_CUDA
from decoded_by_summaries import decode, few_queries
from torch import Tensor

from flash_entmax import KeySummaries, entmax_attention, summarise_keys
from flash_entmax.operators.attention import attention
from flash_entmax.operators.key_summaries import append_keys
from flash_entmax.testing import iid_inputs

# Appending


def tensors_of(summaries: KeySummaries) -> list[Tensor]:
    return [tensor.nan_to_num(-1.0) for tensor in summaries.tensors()]


def assert_equal(one: KeySummaries, other: KeySummaries) -> None:
    assert all(torch.equal(*pair) for pair in zip(tensors_of(one), tensors_of(other), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_by_one_is_as_at_once(backend, dtype):
    key = few_queries(backend, keys=140, batch=2, key_heads=2, dim=40, dtype=dtype).key
    key[0, 0, 3, 1] = torch.nan
    expected = KeySummaries.of(key, capacity=150, skips_blocks=True, impl=backend.impl)
    kind = {"dtype": dtype, "device": backend.device, "skips_blocks": True, "impl": backend.impl}
    summaries = KeySummaries(2, 2, 150, 40, **kind)
    for part in key.split([1, 1, 61, 2, 64, 11], 2):
        summaries.append(part)
    assert_equal(summaries, expected)
    assert summaries.lengths.tolist() == [140, 140]
    assert (summaries.rounded_keys.radius < torch.inf).sum() == 7  # two of each head, but for the block with the NaN


def test_batch_rows_of_their_own_lengths(backend):
    key = few_queries(backend, keys=100, batch=2).key
    summaries = KeySummaries.of(key, capacity=128, impl=backend.impl)
    new, lengths = key[:, :, :3] + 1.0, torch.tensor([62, 5], device=backend.device)
    summaries.append(new, lengths)
    assert summaries.lengths.tolist() == [65, 8]
    key[0, :, 62:65], key[1, :, 5:8] = new[0], new[1]
    expected = KeySummaries.of(key, capacity=128, impl=backend.impl)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(summaries)[1:3], tensors_of(expected)[1:3], strict=True))
    assert (summaries.rounded_keys.error >= expected.rounded_keys.error).all()


def test_what_lies_past_the_capacity_is_refused_on_a_cpu():
    """The lengths say what fits, and those that are given; nothing is written."""
    key = torch.randn(2, 1, 20, 4)
    summaries = KeySummaries.of(key[:, :, :18], capacity=20)
    before = tensors_of(summaries)
    for given, standing in ((None, "[18, 18]"), ([3, 19], "[3, 19]"), ([-1, 3], "[-1, 3]")):
        lengths = None if given is None else torch.tensor(given)
        with pytest.raises(ValueError, match=re.escape(f"capacity, 20, got 3 new keys behind {standing}")):
            summaries.append(key[:, :, :3], lengths)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(summaries), before, strict=True))
    summaries.append(key[:, :, :3], torch.tensor([17, 0]))


def test_what_lies_past_the_capacity_is_left_out_on_a_gpu(backend, monkeypatch):
    """There lengths are not read."""
    monkeypatch.setattr("flash_entmax.key_summaries.check_room", lambda *_: None)
    key = few_queries(backend, keys=70).key
    summaries = KeySummaries.of(key[:, :, :66], impl=backend.impl)
    summaries.append(key[:, :, 62:], torch.tensor([62], device=backend.device))
    expected = KeySummaries.of(key[:, :, :66], impl=backend.impl)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(summaries)[1:], tensors_of(expected)[1:], strict=True))


def test_the_error_bounds_what_is_left_out(backend):
    key = few_queries(backend, keys=130, dim=40).key
    key[:, :, 70:] *= 1e-3
    rounded, unit, error, *_ = KeySummaries.of(key, impl=backend.impl).rounded_keys
    left = (key.double() - (unit.double().unsqueeze(-1) * rounded)[..., :40]).norm(dim=-1)
    for block, own in enumerate(left.split(64, 2)):
        assert (own <= error[:, :, block, None]).all()
        assert (own.amax(-1) > 0.7 * error[:, :, block]).all(), "the bound is far from the error"


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_plain_pytorch_rounds_alike(backend):
    key = few_queries(backend, keys=130, dim=40, dtype=torch.float16).key
    made = (KeySummaries.of(key, skips_blocks=True, impl=impl) for impl in (backend.impl, "torch"))
    ours, plain = (summaries.rounded_keys for summaries in made)
    assert torch.equal(ours.unit, plain.unit)
    different = (ours.rounded.int() - plain.rounded.int()).abs()
    assert different.max() <= (1 if HAS_CUDA else 0)  # a product and a sum may be one operation there
    for name in ("error", "centre", "radius", "centre_error"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-3, atol=1e-5)


def test_reset_forgets_all_keys(backend):
    key = few_queries(backend, keys=70).key
    summaries = KeySummaries.of(1e3 * key, skips_blocks=True, impl=backend.impl)
    summaries.reset()
    assert summaries.rounded_keys.unit.isnan().all()
    assert summaries.rounded_keys.radius.isinf().all()
    summaries.append(key)
    assert_equal(summaries, KeySummaries.of(key, skips_blocks=True, impl=backend.impl))


def test_reorder_copies_batch_rows(backend):
    key = few_queries(backend, keys=70, batch=3).key
    summaries, indices = KeySummaries.of(key, impl=backend.impl), torch.tensor([2, 0, 0], device=backend.device)
    addresses = [tensor.data_ptr() for tensor in summaries.tensors()]
    summaries.reorder(indices)
    assert_equal(summaries, KeySummaries.of(key[indices], impl=backend.impl))
    assert [tensor.data_ptr() for tensor in summaries.tensors()] == addresses


def test_reorder_copies_lengths():
    summaries = KeySummaries(2, 1, 10, 16, dtype=torch.float32, device="cpu", impl="torch")
    summaries.append(torch.randn(2, 1, 2, 16), torch.tensor([1, 5], dtype=torch.int32))
    summaries.reorder(torch.tensor([1, 1]))
    assert summaries.lengths.tolist() == [7, 7]


def test_what_is_reset_is_as_new():
    key = torch.randn(1, 1, 100, 16)
    summaries = KeySummaries.of(key, skips_blocks=True, impl="torch")
    summaries.reset()
    new = KeySummaries(1, 1, 100, 16, dtype=torch.float32, device="cpu", skips_blocks=True, impl="torch")
    for name in ("unit", "error", "radius", "centre_error"):
        ours, theirs = (getattr(each.rounded_keys, name) for each in (summaries, new))
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)


def test_bytes():
    """Of 16-bit keys of 128, half, and 4 bytes for each key."""
    summaries = KeySummaries(2, 3, 640, 128, dtype=torch.bfloat16, device="cpu")
    plain = 2 * 3 * 640 * (128 + 4) + 2 * 3 * 10 * 4 + 2 * 4
    assert summaries.nbytes == plain
    summaries = KeySummaries(2, 3, 640, 128, dtype=torch.bfloat16, device="cpu", skips_blocks=True)
    assert summaries.nbytes == plain + 2 * 3 * 10 * (2 * 128 + 8)


# How it is called


def test_any_strides(backend):
    case = few_queries(backend, keys=70, batch=2, key_heads=2)
    spread = case.key.transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal(KeySummaries.of(spread, impl=backend.impl), KeySummaries.of(case.key, impl=backend.impl))


def test_implementations_without_a_use_for_it_give_the_same_result():
    inputs = iid_inputs(1, 2, 16, 8)
    summaries = KeySummaries.of(inputs[1], impl="torch")
    for options in ({"impl": "reference"}, {"impl": "torch"}, {"impl": "torch", "alpha": 1.0}):
        expected = entmax_attention(*inputs, **options)
        assert torch.equal(entmax_attention(*inputs, key_summary=summaries, **options), expected)


def test_operators(backend):
    case = few_queries(backend, 2, 70)
    summaries = KeySummaries.of(case.key[:, :, :60], capacity=80, skips_blocks=True, impl=backend.impl)
    found = operator_arguments(replace(case, options={"key_summary": summaries}), backend.impl)
    assert all(any(own is given for given in found) for own in summaries.rounded_keys)
    torch.library.opcheck(attention, found)
    arguments = *summaries.rounded_keys, case.key[:, :, 60:], summaries.lengths, backend.impl
    torch.library.opcheck(append_keys, arguments)


def test_compiled(backend):
    case = few_queries(backend, 1, 70)
    summaries = KeySummaries.of(case.key[:, :, :69], capacity=80, skips_blocks=True, impl=backend.impl)

    def step(query, key, value):
        summaries.append(key[:, :, 69:])
        return entmax_attention(query, key, value, key_summary=summaries, impl=backend.impl)

    with torch.no_grad():
        result = torch.compile(step, fullgraph=True, backend="aot_eager")(case.query, case.key, case.value)
        assert summaries.lengths.tolist() == [70]
        assert torch.equal(result, decode(case, backend.impl, summaries))


@pytest.mark.skipif(not HAS_CUDA, reason="needs CUDA")
def test_a_cuda_graph_replays_appending_and_attention(backend):
    if backend.impl != "triton":
        pytest.skip("plain PyTorch waits for the device")
    case = few_queries(backend, 1, 200, dtype=torch.bfloat16, dim=64)
    summaries = KeySummaries.of(case.key[:, :, :100], capacity=200, impl=backend.impl)
    new, lengths = case.key[:, :, 100:101].clone(), torch.tensor([101], device="cuda")

    def step():
        summaries.append(new)
        return attend(case, backend.impl, key_summary=summaries, key_lengths=lengths)

    with torch.no_grad():
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = step()
        for length in range(101, 150):
            new.copy_(case.key[:, :, length : length + 1])
            lengths.fill_(length + 1)
            graph.replay()
            own = replace(case, options={"key_lengths": lengths.clone()})
            assert torch.equal(output, decode(own, backend.impl, KeySummaries.of(case.key, impl=backend.impl)))


# What is refused


def test_what_has_no_use_for_it_is_refused(backend):
    case = few_queries(backend, 1, 70)
    summaries = KeySummaries.of(case.key, impl=backend.impl)
    with pytest.raises(ValueError, match="key_summary=KeySummaries is for calls without gradients"):
        attend(replace(case, query=case.query.requires_grad_()), backend.impl, key_summary=summaries)
    with pytest.raises(ValueError, match="key_summary=KeySummaries is for calls without gradients"):
        attend(few_queries(backend, 1, 70), backend.impl, key_summary=summaries, return_support=True)
    with pytest.raises(ValueError, match="is for at most 16 queries, got 17"):
        attend(few_queries(backend, 17, 70), backend.impl, key_summary=summaries)


def test_summaries_of_other_keys_are_refused(backend):
    case = few_queries(backend, 1, 70)

    def made(batch=1, key_heads=1, capacity=70, head_size=16, dtype=torch.float32, device=backend.device):
        return KeySummaries(batch, key_heads, capacity, head_size, dtype=dtype, device=device, impl="torch")

    for wrong, error, message in (
        (made(batch=2), ValueError, r"\(1, 1, 16\), got \(2, 1, 16\)"),
        (made(key_heads=3), ValueError, r"\(1, 1, 16\), got \(1, 3, 16\)"),
        (made(head_size=15), ValueError, r"\(1, 1, 16\), got \(1, 1, 15\)"),
        (made(capacity=69), ValueError, "must have room for 70 keys, got a capacity of 69"),
        (made(dtype=torch.float16), TypeError, "must be for torch.float32, the dtype of the keys, got torch.float16"),
        (made(device="meta"), ValueError, "must be on the device of the keys, .*, got meta"),
    ):
        with pytest.raises(error, match=message):
            decode(case, backend.impl, wrong)
    with pytest.raises(TypeError, match="must be what summarise_keys returns, or KeySummaries, got RoundedKeys"):
        decode(case, backend.impl, made().rounded_keys)
    with torch.no_grad():
        attend(case, backend.impl, key_summary=summarise_keys(case.key, impl=backend.impl))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"batch": -1}, ValueError, "batch must be from 0 to 1073741824, got -1"),
        ({"key_heads": 1.0}, TypeError, "key_heads must be an integer, got float 1.0"),
        ({"capacity": 2**30 + 1}, ValueError, "capacity must be from 0 to 1073741824, got 1073741825"),
        ({"head_size": 513}, ValueError, "head_size must be from 1 to 512, got 513"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float16, bfloat16 or float32, got torch.float64"),
        ({"impl": "reference"}, ValueError, "impl must be one of"),
        ({"skips_blocks": 1}, TypeError, "skips_blocks must be True or False, got 1"),
    ],
)
def test_sizes_that_are_refused(wrong, error, message):
    given = {"batch": 1, "key_heads": 1, "capacity": 8, "head_size": 4, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(error, match=message):
        KeySummaries(**given | wrong)


def test_keys_that_are_refused():
    summaries = KeySummaries(2, 1, 8, 4, dtype=torch.float32, device="cpu")
    key = torch.zeros(2, 1, 3, 4)
    for wrong, error, message in (
        ("key", TypeError, "key must be a torch.Tensor, got str"),
        (key[:1], ValueError, r"key must have shape \(2, 1, new keys, 4\), .*, got \(1, 1, 3, 4\)"),
        (key[0], ValueError, r"key must have shape \(2, 1, new keys, 4\), .*, got \(1, 3, 4\)"),
        (torch.zeros(2, 1, 9, 4), ValueError, "key must have at most 8 new keys, the capacity, got 9"),
        (key.half(), TypeError, "key must be torch.float32, which these summaries are for, got torch.float16"),
        (key.to("meta"), ValueError, "key must be on cpu, the device of these summaries, got meta"),
    ):
        with pytest.raises(error, match=message):
            summaries.append(wrong)
    for lengths, error in ((3, TypeError), (torch.zeros(1).int(), ValueError), (torch.zeros(2), TypeError)):
        with pytest.raises(error, match="key_lengths must"):
            summaries.append(key, lengths)
        with pytest.raises(error, match="indices must"):
            summaries.reorder(lengths)
    with pytest.raises(ValueError, match=r"indices must be from 0 to 1, got \[0, 2\]"):
        summaries.reorder(torch.tensor([0, 2]))
    lengths = torch.zeros(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="key_lengths must be on the device of the key, cpu, got meta"):
        summaries.append(key, lengths)
    with pytest.raises(ValueError, match="indices must be on the device of these summaries, cpu, got meta"):
        summaries.reorder(lengths)
    with pytest.raises(ValueError, match="capacity must be at least 3, the length of the keys, got 2"):
        KeySummaries.of(key, capacity=2)


def test_nothing_to_append(backend):
    for shape in ((1, 1, 0, 4), (0, 1, 3, 4), (1, 0, 3, 4)):
        key = torch.zeros(shape, device=backend.device)
        summaries = KeySummaries.of(key, impl=backend.impl)
        summaries.append(key[:, :, :0])
        query = torch.zeros(shape[0], shape[1], 1, 4, device=backend.device)
        assert entmax_attention(query, key, key, key_summary=summaries, impl=backend.impl).shape == query.shape
