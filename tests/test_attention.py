"""What every implementation must give: exact output, gradients and support, whatever the shapes, strides and scores."""

import pytest
import torch
from cases import Case, attend, make_case, names, run
from checks import check_attention, check_causal_alignment, check_live_map, check_row_sums, score_rounding
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flash_entmax import entmax_attention
from flash_entmax.testing import DISTRIBUTIONS, iid_inputs, inputs_with_scores, score_rows, topic_inputs

HEAD_SIZES = (1, 2, 3, 16, 17, 32, 64, 80, 96, 128, 160, 256, 300, 512)


@st.composite
def shapes(draw, longest: int):
    key_heads = draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": key_heads * draw(st.integers(1, 3)),
        "key_heads": key_heads,
        "length": draw(st.one_of(st.integers(1, longest), st.sampled_from([1, 63, 64, 65, 128]))),
        "key_length": draw(st.one_of(st.integers(1, longest), st.sampled_from([1, 63, 64, 65, 128]))),
        "dim": draw(st.sampled_from(HEAD_SIZES)),
        "value_dim": draw(st.sampled_from(HEAD_SIZES)),
    }


alphas = st.one_of(st.just(1.5), st.sampled_from([2.0, 1.25, 4 / 3]), st.floats(1.05, 2.0))


def check_drawn(backend, data, longest: int) -> None:
    shape = data.draw(shapes(longest), label="shape")
    if backend.is_interpreted and shape["batch"] * shape["heads"] > 2:
        shape |= {"batch": 1, "heads": 2, "key_heads": min(2, shape["key_heads"])}
    case = make_case(
        backend,
        **shape,
        dtype=data.draw(st.sampled_from(backend.dtypes), label="dtype"),
        alpha=data.draw(alphas, label="alpha"),
        is_causal=data.draw(st.booleans(), label="is_causal"),
        scale=data.draw(st.sampled_from([None, None, 1.0, 0.05]), label="scale"),
        seed=data.draw(st.integers(0, 10**6), label="seed"),
    )
    check_attention(case, backend.impl, more=score_rounding(case))


def test_any_shape(backend):
    """Output and gradients within budget of the float64 reference; support sizes and live tiles equal to its own."""

    # To shrink a failure would take the interpreter minutes.
    phases = [phase for phase in Phase if phase is not Phase.shrink or not backend.is_interpreted]

    @settings(max_examples=backend.sizes(12, 100, 8), phases=phases)
    @given(st.data())
    def check(data):
        check_drawn(backend, data, backend.sizes(80, 300, 700))

    check()


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_inputs(backend, alpha, is_causal):
    length = backend.sizes(90, 600, 4096)
    case = make_case(backend, length=length, dim=64, key_heads=1, alpha=alpha, is_causal=is_causal)
    check_attention(case, backend.impl)


@pytest.mark.parametrize("topics", [1, 4])
def test_topics(backend, topics):
    length = backend.sizes(128, 600, 8192)
    for dtype in backend.dtypes[-2:]:
        tensors = topic_inputs(1, 2, length, 64, topics, key_heads=1, dtype=dtype, device=backend.device)
        check_attention(Case(*tensors, is_causal=True), backend.impl)


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "fused with another tensor": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "every second row": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "every second column": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "head size before length": lambda t: t.mT.contiguous().mT,
    "expanded over the batch": lambda t: t[:1].expand(t.shape),
    "expanded over the heads": lambda t: t[:, :1].expand(t.shape),
    "expanded over the length": lambda t: t[:, :, :1].expand(t.shape),
    "behind an odd offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    """A view gives what its contiguous copy gives, and so does a view of the incoming gradient."""
    case = make_case(backend, batch=2, length=backend.sizes(20, 70, 70), key_length=backend.sizes(40, 90, 90), dim=24)
    view = LAYOUTS[layout]
    strided = Case(view(case.query), view(case.key), view(case.value), is_causal=True)
    copied = Case(*(t.contiguous() for t in (strided.query, strided.key, strided.value)), is_causal=True)
    check_attention(strided, backend.impl)
    grad_output = case.grad_output()
    expected = run(copied, backend.impl, view(grad_output).contiguous())
    actual = run(strided, backend.impl, view(grad_output))
    for name, ours, theirs in zip(names(strided), actual.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dim", [16, 24])
@pytest.mark.parametrize("rows_first", [False, True])
def test_results_lie_as_their_inputs(backend, dim, rows_first):
    """Output and gradients are stored heads first or rows first, as query, key and value are, each for itself."""
    case = make_case(backend, length=backend.sizes(20, 70, 70), key_length=backend.sizes(40, 90, 90), dim=dim)
    query, key, value = case.query, case.key, case.value
    if rows_first:
        query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    query, key, value = (t.requires_grad_() for t in (query, key, value))
    output = entmax_attention(query, key, value, impl=backend.impl)
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert output.stride() == query.stride()
    for gradient, tensor in zip(gradients, (query, key, value), strict=True):
        assert gradient.stride() == tensor.stride()


@pytest.mark.parametrize("queries", [3, 64, 100])
@pytest.mark.parametrize("keys", [3, 64, 100])
def test_causal_mask_is_aligned_to_the_lower_right(backend, queries, keys):
    check_causal_alignment(queries, keys, backend.impl, backend.device)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.2])
def test_queries_without_a_key_are_zero(backend, alpha):
    """The first queries of a causal call with more queries than keys see nothing: output 0, gradient 0, size 0."""
    case = make_case(backend, length=110, key_length=40, alpha=alpha, is_causal=True)
    result = check_attention(case, backend.impl)
    blind = 110 - 40
    assert torch.equal(result.output[:, :, :blind], torch.zeros_like(result.output[:, :, :blind]))
    assert (result.output[:, :, blind:] != 0).any(-1).all()
    assert (result.gradients[0][:, :, :blind] == 0).all()
    assert (result.support.size[:, :, :blind] == 0).all()
    assert (result.support.tau[:, :, :blind] == torch.inf).all()


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 5, 1), (5, 0, 1), (0, 0, 1), (5, 5, 0)])
def test_empty_inputs(backend, queries, keys, batch):
    case = make_case(backend, batch=batch, length=queries, key_length=keys)
    grad_output = case.grad_output()
    result = run(case, backend.impl, grad_output)
    assert result.output.shape == grad_output.shape
    assert (result.output == 0).all()
    for gradient, tensor in zip(result.gradients, (case.query, case.key, case.value), strict=True):
        assert gradient.shape == tensor.shape
        assert (gradient == 0).all()
    assert (result.support.size == 0).all()


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_sum_to_one(backend, alpha, is_causal):
    """Every distribution, one a row, all in one tile, so that each waits for the others."""
    for length in backend.sizes((50, 130), (50, 257, 4096, 131072), (50, 257, 4096, 131072)):
        rows = [score_rows(name, length, rows=2, dtype=torch.float32, seed=length) for name in DISTRIBUTIONS]
        check_row_sums(torch.cat(rows).to(backend.device), alpha, backend.impl, is_causal)


@pytest.mark.parametrize("power", [3, 4, 5, 7, 10, 16, 17])
def test_alpha_whose_exponent_is_whole(backend, power):
    """Up to 16, d^(1 / (alpha - 1)) is a few products; beyond, it is a power as for any alpha."""
    for dtype in backend.dtypes:
        case = make_case(backend, length=90, key_heads=1, alpha=1 + 1 / power, scale=1.0, is_causal=True, dtype=dtype)
        check_attention(case, backend.impl)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rows_sum_to_one_at_many_keys(backend, distribution):
    """The default alpha, each distribution by itself: its tile stops as soon as its own rows have converged."""
    length = backend.sizes(1000, 131072, 131072)
    z = score_rows(distribution, length, rows=2, dtype=torch.float32, device=backend.device)
    check_row_sums(z, 1.5, backend.impl)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_every_distribution(backend, distribution, alpha):
    """Output, gradients and support where the scores are given: flat, tied, peaked, large, negative."""
    z = score_rows(distribution, backend.sizes(100, 700, 3000), rows=20, dtype=torch.float32, device=backend.device)
    query, key, scale = inputs_with_scores(z, alpha)
    value = iid_inputs(1, 1, z.shape[1], 16, device=backend.device)[2]
    case = Case(query, key, value, alpha=alpha, scale=scale, scores_are_exact=True)
    if alpha == 2.0 and distribution in ("heavy ties", "all equal"):
        # Scores at tau exactly, or all as near to it as n^-1: which side they fall on is a matter of rounding.
        check_live_map(case, backend.impl, attend(case.in_float64(), "reference", return_support=True)[1])
        return
    check_attention(case, backend.impl)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_magnitude_1000(backend, alpha, sign):
    """Scores near +1000 and near -1000: the offset keeps its digits only apart from the maximum."""
    case = make_case(backend, length=100, key_length=120, dim=8, alpha=alpha, scale=1.0)
    case.query, case.key = ((4 * tensor).round() / 16 for tensor in (case.query, case.key))
    case.query[..., 0], case.key[..., 0] = 32.0, sign * 1000 / 32 / (alpha - 1)
    case.scores_are_exact = True  # products are multiples of 2^-8 below 2^12: no operation rounds
    result = check_attention(case, backend.impl)
    assert (result.support.maximum.abs() > 900).all()
    assert (result.support.size > 1).float().mean() > 0.9


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_repeats_are_bit_identical(backend, alpha, is_causal):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        case = make_case(
            backend,
            heads=backend.sizes(2, 4, 4),
            length=backend.sizes(70, 700, 2000),
            key_heads=backend.sizes(1, 2, 2),
            dim=32,
            alpha=alpha,
        )
        case.is_causal = is_causal
        grad_output = case.grad_output()
        first = run(case, backend.impl, grad_output)
        for _ in range(backend.sizes(1, 3, 5)):
            again = run(case, backend.impl, grad_output)
            for name, ours, theirs in zip(names(case), again.tensors, first.tensors, strict=True):
                assert torch.equal(ours, theirs), name
            for ours, theirs in zip(again.support, first.support, strict=True):
                assert ours == theirs if isinstance(ours, tuple) else torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_not_modified(backend):
    case = make_case(backend, length=70, is_causal=True)
    grad_output = case.grad_output()
    tensors = case.query, case.key, case.value, grad_output
    before = [tensor.clone() for tensor in tensors]
    run(case, backend.impl, grad_output)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("topics", [1, 2, 4])
@pytest.mark.parametrize("wide_blocks", [False, True])
def test_dead_tiles_are_dead(backend, topics, wide_blocks):
    """The operator keeps about 1 / topics of the tiles, and all that hold support: by bounds on blocks or by scores."""
    length = backend.sizes(256, 1536 if topics == 4 else 1024, 8192)
    heads = backend.sizes(1, 2, 2)
    tensors = topic_inputs(1, heads, length, 64, topics, device=backend.device, seed=3, wide_blocks=wide_blocks)
    case = Case(*tensors)
    exact = attend(case.in_float64(), "reference", return_support=True)[1]
    live = check_live_map(case, backend.impl, exact)
    truly = exact.tiles.float().mean().item()
    tolerance = backend.sizes(0.25, 0.08, 0.04)
    assert live.float().mean().item() == pytest.approx(1 / topics, abs=tolerance)
    if live.shape == exact.tiles.shape:
        assert live.float().mean().item() <= truly + 0.01
    _, support = attend(case, backend.impl, return_support=True)
    assert support.tiles.float().mean().item() <= live.float().mean().item()


def test_gradients_are_not_computed_where_not_needed(backend):
    """Without gradients the output is the same, and one leaf alone gets the gradient that it gets among three."""
    case = make_case(backend, length=70)
    grad_output = case.grad_output()
    expected = run(case, backend.impl, grad_output)
    with torch.no_grad():
        output = attend(case, backend.impl)
    assert not output.requires_grad
    assert torch.equal(output, expected.output)
    leaf = case.key.clone().requires_grad_()
    output = attend(Case(case.query, leaf, case.value), backend.impl)
    assert torch.equal(torch.autograd.grad(output, leaf, grad_output)[0], expected.gradients[1])


def test_support_carries_no_gradient(backend):
    case = make_case(backend, length=70)
    case.query.requires_grad_()
    output, support = attend(case, backend.impl, return_support=True)
    assert output.requires_grad
    assert not support.tau.requires_grad
    assert torch.equal(output, attend(case, backend.impl))


@pytest.mark.parametrize("queries", [1, 31, 63, 65])
def test_a_partial_tile_of_queries_keeps_no_dead_tile(backend, queries):
    """Rows past the last query must not keep tiles alive; equal queries have few live tiles."""
    query, key, value = iid_inputs(1, 1, 1, 16, key_length=256, device=backend.device, seed=5)
    case = Case(3 * query.expand(-1, -1, queries, -1), 3 * key, value, scale=1.0)
    exact = attend(case.in_float64(), "reference", return_support=True)[1]
    live = check_live_map(case, backend.impl, exact)
    assert live.sum() <= 2 * live.any(-1).sum()
