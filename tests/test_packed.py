"""Packed sequences: each attends to itself only, as if it were alone; nothing else is read, nothing else is written."""

from itertools import pairwise

import pytest
import torch
from cases import Case, attend, boundaries, longest, make_case, names, packed_case, run
from checks import check_attention
from conftest import HAS_CUDA, Backend

from flash_entmax import entmax_attention, entmax_attention_varlen
from flash_entmax.testing import poisoned

QUERIES, KEYS = (5, 0, 33, 70, 1, 0, 9), (9, 4, 0, 66, 3, 0, 20)
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (5, 2)},
    "causal window": {"window_size": (7, -1), "is_causal": True},
    "right window": {"window_size": (-1, 1)},
    "softcap": {"softcap": 1.5, "is_causal": True},
    "alpha": {"alpha": 1.3},
}


def slices(cu_seq):
    edges = cu_seq.tolist()
    return [slice(start, stop) for start, stop in pairwise(edges)]


def run_alone(case: Case, impl: str, grad_output) -> tuple[torch.Tensor, ...]:
    """Output and gradients of every sequence by itself, each where its tokens are; 0 elsewhere. Parameters: summed."""
    output = torch.zeros_like(grad_output)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in case.tensors.items()}
    cu_seq_q = case.options["cu_seq_q"]
    cu_seq_k = case.options.get("cu_seq_k", cu_seq_q)
    options = {name: option for name, option in case.options.items() if not name.startswith("cu_seq")}
    positions = options.get("query_positions")
    for queries, keys in zip(slices(cu_seq_q), slices(cu_seq_k), strict=True):
        rows = {"query": queries, "key": keys, "value": keys}
        tensors = {name: case.batched(getattr(case, name)[place]) for name, place in rows.items()}
        if positions is not None:
            options["query_positions"] = positions[queries]
        alone = Case(**tensors, alpha=case.alpha, is_causal=case.is_causal, scale=case.scale, options=options)
        result = run(alone, impl, case.batched(grad_output[queries]))
        output[queries] = case.as_given(result.output)
        for (name, whole), part in zip(gradients.items(), result.gradients, strict=True):
            if name in rows:
                whole[rows[name]] = case.as_given(part)
            else:
                whole += part
    return output, *gradients.values()


def check_alone(case: Case, impl: str) -> None:
    grad_output = case.grad_output()
    result = run(case, impl, grad_output)
    for name, ours, theirs in zip(names(case), result.tensors, run_alone(case, impl, grad_output), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("keys", [None, KEYS], ids=["self", "cross"])
def test_every_sequence_is_alone(backend, options, keys):
    check_alone(packed_case(backend, QUERIES, keys, heads=1, spare=3, **OPTIONS[options]), backend.impl)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_grouped_queries_and_learned_numbers(backend, index_dtype):
    """Two query heads on one key head; alpha and slopes per head: their gradients are sums over the sequences."""
    alpha, slopes = (torch.tensor(pair, device=backend.device) for pair in ((1.3, 1.5), (0.05, -0.02)))
    case = packed_case(
        backend, QUERIES, KEYS, key_heads=1, index_dtype=index_dtype, alpha=alpha, alibi_slopes=slopes, is_causal=True
    )
    check_alone(case, backend.impl)
    check_attention(case, backend.impl)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_against_the_reference(backend, alpha):
    for dtype in backend.dtypes:
        case = packed_case(backend, (65, 3, 0, 40), (70, 2, 5, 20), spare=9, dtype=dtype, alpha=alpha, is_causal=True)
        check_attention(case, backend.impl)


def test_many_short_sequences(backend):
    """Of 1 to 5 tokens: a tile of queries holds a dozen, and sees few keys."""
    count = backend.sizes(40, 200, 2000)
    lengths = torch.randint(1, 6, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    for is_causal in (False, True):
        case = packed_case(backend, lengths, heads=1, is_causal=is_causal)
        check_attention(case, backend.impl)
    check_alone(case, backend.impl)


def test_positions_within_the_sequence(backend):
    """Queries from the middle of their sequences: those that another split of the same work computes."""
    positions = torch.cat([torch.arange(20) + 10, torch.arange(30).flip(0)]).to(backend.device)
    case = packed_case(backend, (20, 30), (40, 33), is_causal=True, query_positions=positions)
    check_alone(case, backend.impl)
    check_attention(case, backend.impl)


@pytest.mark.parametrize("keys", [None, (9, 4, 30)], ids=["self", "cross"])
def test_tokens_past_the_last_boundary_are_zero(backend, keys):
    """Whatever uninitialised memory holds: output 0 and gradients 0, also for keys and values there."""
    with poisoned():
        case = packed_case(backend, (5, 0, 33), keys, spare=70)
        result = run(case, backend.impl, case.grad_output())
    assert all(tensor.isfinite().all() for tensor in result.tensors)
    used = {"query": 38, "key": sum(keys or (38,)), "value": sum(keys or (38,))}
    assert (result.output[38:] == 0).all()
    assert (result.support.size[..., 38:] == 0).all()
    for (name, stop), gradient in zip(used.items(), result.gradients, strict=True):
        assert (gradient[:stop] != 0).any(), name
        assert (gradient[stop:] == 0).all(), name


def test_sequences_without_queries_or_keys(backend):
    """A sequence without keys gives its queries output 0; one without queries gives its keys gradient 0."""
    case = packed_case(backend, (6, 0, 7), (0, 8, 5))
    result = run(case, backend.impl, case.grad_output())
    assert (result.output[:6] == 0).all()
    assert (result.output[6:] != 0).any(-1).all()
    assert (result.gradients[0][:6] == 0).all()
    for gradient in result.gradients[1:]:
        assert (gradient[:8] == 0).all()
        assert (gradient[8:] != 0).any()


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_sequence(backend, tokens):
    """One boundary, 0: every token is past the last."""
    case = packed_case(backend, (), spare=tokens)
    result = run(case, backend.impl, case.grad_output())
    assert result.output.shape == case.query.shape
    assert all((tensor == 0).all() for tensor in result.tensors)


def test_equal_boundaries_are_said_in_three_ways(backend):
    """None, the same tensor and an equal tensor: the last knows less about what queries see, and gives the same."""
    case = packed_case(backend, QUERIES, is_causal=True)
    cu_seq = case.options["cu_seq_q"]
    expected = attend(case, backend.impl)
    assert torch.equal(attend(case, backend.impl, cu_seq_k=cu_seq), expected)
    torch.testing.assert_close(attend(case, backend.impl, cu_seq_k=cu_seq.clone()), expected, rtol=1e-5, atol=1e-6)


def test_generous_lengths_change_nothing(backend):
    case = packed_case(backend, QUERIES, is_causal=True)
    torch.testing.assert_close(
        attend(case, backend.impl, max_q=2**31, max_k=2**31), attend(case, backend.impl), rtol=1e-5, atol=1e-6
    )


def test_causality_is_a_window(backend):
    case = packed_case(backend, QUERIES, KEYS, is_causal=True)
    window = packed_case(backend, QUERIES, KEYS, window_size=(-1, 0))
    assert torch.equal(attend(case, backend.impl), attend(window, backend.impl))


def jagged(tensor, cu_seq):
    """(tokens, heads, dim) -> (batch, heads, ragged length, dim), as scaled_dot_product_attention takes it."""
    return torch.nested.nested_tensor_from_jagged(tensor, cu_seq).transpose(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [None, (9, 4, 1, 66, 3)], ids=["self", "cross"])
def test_nested_tensors_are_packed_sequences(backend, is_causal, keys):
    """Jagged in and jagged out, with the gradients of the packed call."""
    case = packed_case(backend, (5, 2, 33, 70, 1), keys, is_causal=is_causal, index_dtype=torch.int64)
    grad_output = case.grad_output()
    expected = run(case, backend.impl, grad_output)
    leaves = case.leaves()
    cu_seq_q = case.options["cu_seq_q"]
    cu_seq_k = case.options.get("cu_seq_k", cu_seq_q)
    nested = [jagged(t, cu) for t, cu in zip(leaves.values(), (cu_seq_q, cu_seq_k, cu_seq_k), strict=True)]
    output = entmax_attention(*nested, is_causal=is_causal, impl=backend.impl)
    assert output.is_nested
    assert output.shape == nested[0].shape
    tokens = output.transpose(1, 2).values()
    gradients = torch.autograd.grad(tokens, list(leaves.values()), grad_output)
    for ours, theirs in zip((tokens, *gradients), expected.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nested_tensors_of_the_jagged_layout(backend):
    """torch.nested.nested_tensor, which makes offsets by itself."""
    parts = [make_case(backend, length=length, seed=length) for length in (7, 64, 20)]
    tensors = (
        torch.nested.nested_tensor([getattr(part, name)[0].transpose(0, 1) for part in parts], layout=torch.jagged)
        for name in ("query", "key", "value")
    )
    output = entmax_attention(*(tensor.transpose(1, 2) for tensor in tensors), impl=backend.impl)
    for part, ours in zip(parts, output.transpose(1, 2).unbind(), strict=True):
        torch.testing.assert_close(ours.transpose(0, 1)[None], attend(part, backend.impl), rtol=1e-5, atol=1e-6)


WRONG = [
    ((1, 5), (0, 5), 5, r"cu_seq_q must rise from 0.*\[1, 5\]"),
    ((0, 3, 2), (0, 3, 5), 5, r"cu_seq_q must rise from 0.*\[0, 3, 2\]"),
    ((0, 11), (0, 5), 20, r"cu_seq_q.*at most 10 tokens.*\[0, 11\]"),
    ((0, 5), (0, 11), 20, r"cu_seq_k.*at most 10 tokens.*\[0, 11\]"),
    ((0, 5), (0, 5), 4, r"cu_seq_q.*steps of at most 4.*\[0, 5\]"),
]


@pytest.mark.parametrize("cu_seq_q", [None, [0, 8]])
def test_boundaries_that_are_no_tensor_are_refused(cu_seq_q):
    """Without boundaries every token would see every other."""
    tensors = (torch.zeros(8, 1, 16) for _ in range(3))
    with pytest.raises(TypeError, match=r"cu_seq_q must be a torch.Tensor, got (NoneType|list)"):
        entmax_attention_varlen(*tensors, cu_seq_q, torch.tensor([0, 8]), 8, 8)


@pytest.mark.parametrize(("cu_seq_q", "cu_seq_k", "most", "match"), WRONG)
def test_wrong_boundaries_are_refused(cu_seq_q, cu_seq_k, most, match):
    tensors = (torch.zeros(10, 1, 8) for _ in range(3))
    cu_seq = (torch.tensor(edges) for edges in (cu_seq_q, cu_seq_k))
    with pytest.raises(ValueError, match=match):
        entmax_attention_varlen(*tensors, *cu_seq, most, most)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (100, 0)}], ids=str)
def test_nothing_waits_for_the_device(options):
    backend = Backend("triton", "cuda")
    case = packed_case(backend, (500, 0, 3, 1000), spare=7, dtype=torch.bfloat16, **options)
    cu_seq = boundaries((500, 0, 3, 1000), backend.device)
    most, grad_output, leaves = longest(cu_seq), case.grad_output(), list(case.leaves().values())
    del case.options["cu_seq_q"]

    def step():
        output = entmax_attention_varlen(*leaves, cu_seq, None, most, most, is_causal=case.is_causal, **case.options)
        return torch.autograd.grad(output, leaves, grad_output)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
