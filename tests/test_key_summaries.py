"""Decoding by KeySummaries: keys in 8 bits beside a cache, and the same results as without."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from cases import Case, attend, make_case, run_dense
from checks import operator_arguments
from conftest import HAS_CUDA
from mutants import Mutant, plant
from torch import Tensor

from flash_entmax import KeySummaries, entmax_attention, summarise_keys
from flash_entmax.operators.attention import attention
from flash_entmax.operators.key_summaries import append_keys
from flash_entmax.testing import assert_within_budget, iid_inputs, poisoned

COPIES = 0.02  # how far keys that are nearly one lie apart


def decode(case: Case, impl: str, summaries: KeySummaries) -> Tensor:
    with torch.no_grad():
        return attend(case, impl, key_summary=summaries)


def check(case: Case, impl: str, summaries: KeySummaries | None = None) -> Tensor:
    """The output against the float64 reference, with summaries of both kinds."""
    if summaries is None:
        summaries = KeySummaries.of(case.key, impl=impl)
        if impl == "triton":
            check(case, impl, KeySummaries.of(case.key, skips_blocks=True, impl=impl))
    actual = decode(case, impl, summaries)
    exact = attend(case.in_float64(), "reference")
    dense = run_dense(case, case.grad_output()).output
    assert_within_budget(actual, exact, dense, name="output", magnitude=case.value.double().abs().amax().item())
    return actual


def few_queries(backend, queries=2, keys=None, **options) -> Case:
    keys = backend.sizes(130, 300, 700) if keys is None else keys
    return make_case(backend, length=queries, key_length=keys, **{"value_dim": 8, "key_heads": 1, **options})


def near_ties(backend, dtype=torch.float32) -> Case:
    """Keys that are nearly one: their scores differ by less than 8 bits can say, and their probabilities by much."""
    case = few_queries(backend, keys=150, dtype=dtype, dim=32, scale=30.0)
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(1, 1, 1, 32, generator=generator)
    key = one + COPIES * torch.randn(1, 1, 150, 32, generator=generator)
    return replace(case, key=key.to(case.key))


def sparse(backend, dtype=torch.float32) -> tuple[Case, Tensor]:
    """Each query attends to few keys, far above all others; and which keys these are."""
    case = few_queries(backend, heads=4, key_heads=2, keys=200, dim=32, dtype=dtype)
    near = torch.zeros(200, dtype=torch.bool, device=backend.device)
    near[[3, 64, 130, 199]] = True
    case.query[..., 0], case.key[..., 0] = 8.0, torch.where(near, 8.0, -8.0).to(dtype)
    return case, near


def blocks_apart(backend) -> tuple[Case, Tensor]:
    """Blocks of similar keys, of which one is near all queries; and which keys are in it."""
    case = few_queries(backend, heads=4, key_heads=2, keys=256, dim=32)
    near = torch.arange(256, device=backend.device) // 64 == 2
    case.query[..., 0], case.key[..., 0] = 8.0, torch.where(near, 8.0, -8.0)
    return case, near


def blocks_side_by_side(backend) -> Case:
    """Two blocks of equal keys share the support. The z of the second is 0.1 below the maximum."""
    case = few_queries(backend, keys=256, dim=32)
    case.query[..., 0] = 8.0
    case.key.zero_()
    place = torch.arange(256, device=backend.device) // 64
    case.key[..., 0] = torch.where(place == 0, 8.0, torch.where(place == 1, 8.0 - 0.1 * 2 * 32**0.5 / 8, -8.0))
    return case


def support_in_a_wide_block(backend) -> Case:
    """The first block of keys has all the support, but its mean is far from the queries and from the other keys."""
    case = few_queries(backend, keys=192)
    case.query[..., 0] += 8.0
    case.key[..., 0] += 6.0
    case.key[:, :, :64, 0] = torch.tensor([16.0, -16.0], device=backend.device).repeat(32)
    return case


def keys_of_whole_numbers(backend) -> Case:
    """Keys that 8 bits hold: only the query is rounded."""
    case = few_queries(backend, 16, 300, dim=32, scale=0.02)
    generator = torch.Generator().manual_seed(1)
    key = torch.randint(-127, 128, case.key.shape, generator=generator)
    key[..., 0] = 127
    return replace(case, key=key.to(case.key))


# Results are those of the specification


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


def test_scores_that_overflow_spoil_their_rows(backend):
    case = few_queries(backend, 1, 130)
    big = replace(case, query=case.query.abs() * 1e30, key=case.key.abs() * 1e30)
    assert decode(big, backend.impl, KeySummaries.of(big.key, impl=backend.impl)).isnan().all()


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


def test_what_lies_past_the_capacity_is_left_out(backend):
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
    with pytest.raises(ValueError, match="capacity must be at least 3, the length of the keys, got 2"):
        KeySummaries.of(key, capacity=2)


def test_nothing_to_append(backend):
    for shape in ((1, 1, 0, 4), (0, 1, 3, 4), (1, 0, 3, 4)):
        key = torch.zeros(shape, device=backend.device)
        summaries = KeySummaries.of(key, impl=backend.impl)
        summaries.append(key[:, :, :0])
        query = torch.zeros(shape[0], shape[1], 1, 4, device=backend.device)
        assert entmax_attention(query, key, key, key_summary=summaries, impl=backend.impl).shape == query.shape


# Deliberate faults, in Triton's interpreter

if not HAS_CUDA and find_spec("triton"):
    from conftest import Backend

    from flash_entmax.backends.triton import append, decode_blocks, decode_summaries

    FAULTS = {
        "the margin is forgotten": (
            decode_summaries, "bound_scores", "margin = ...", "margin = 0.0 * (...)", "nearly one",
        ),
        "a tile's largest score is bounded from above only": (
            decode_summaries, "bound_scores", "largest - 2.0 * tl.max(margin, 1)", "largest", "nearly one",
        ),
        "the low bits of the query are left out": (
            decode_summaries, "product_of_integers", "queries.low", "0 * queries.low", "whole numbers",
        ),
        "scores of candidates are their bounds": (
            decode_summaries, "score_candidates", "range(0, count, BLOCK)", "range(0, 0, BLOCK)", "nearly one",
        ),
        "the offset is not moved to the row's maximum": (
            decode_summaries, "moved_offset", "(row.maximum - least)", "0.0", "planted",
        ),
        "the last key's error is forgotten": (
            append, "append_kernel", "tl.max(tl.where(inside, key_errors, 0.0), 0)", "0.0", "nearly one",
        ),
        "blocks are taken for points": (
            append, "bounds_of", "tl.max(norm(x - c[None, :], 1), 0)", "0.0", "wide block",
        ),
        "tau is taken to be nearer to the maximum": (
            decode_blocks, "list_reached_tiles", "-1.0 - ...", "-0.05", "side by side",
        ),
        "a listed tile is dropped": (decode_blocks, "list_reached_tiles", "return ...", "return ... - 1", "side by side"),
        "a key that is not finite is rounded": (
            append, "rounded_of", 'tl.where(is_finite, unit, float("nan"))', "unit", "bad key",
        ),
    }  # fmt: skip
    INTERPRETER = Backend("triton", "cpu")
    CHECKS = {
        "nearly one": lambda: check(near_ties(INTERPRETER), "triton"),
        "whole numbers": lambda: check(keys_of_whole_numbers(INTERPRETER), "triton"),
        "planted": lambda: check(sparse(INTERPRETER)[0], "triton"),
        "wide block": lambda: check(support_in_a_wide_block(INTERPRETER), "triton"),
        "side by side": lambda: check(blocks_side_by_side(INTERPRETER), "triton"),
        "bad key": lambda: test_a_bad_key_spoils_the_rows_that_see_it(INTERPRETER, torch.nan),
    }

    @pytest.mark.parametrize("fault", FAULTS)
    def test_fault_is_seen(fault, monkeypatch, tmp_path):
        *mutant, name = FAULTS[fault]
        plant(Mutant(*mutant), monkeypatch, tmp_path)
        with pytest.raises(AssertionError):
            CHECKS[name]()
