"""Numbers at their limits: large and equal scores, hidden NaN, no elements, more elements than 32 bits count."""

import pytest
import torch
from cases import Case, attend, make_case, packed_case, run
from checks import assert_unchanged, check_attention
from conftest import HAS_CUDA
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax import entmax_attention
from flash_entmax.testing import iid_inputs, relative_error

BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("largest", [100.0, 1e4])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_scores_up_to_ten_thousand(backend, largest, alpha):
    """Few keys win by far: results stay within the budget of every dtype, though a score of 1e4 has a rounding of 1e-3
    in float32. Products are exact here, so that no sum rounds."""
    for dtype in backend.dtypes:
        query, key, value = iid_inputs(1, 2, 70, 16, key_length=130, device=backend.device)
        query, key = (tensor.sign() * (tensor.abs() * 4).round().clamp(1, 8) for tensor in (query, key))
        tensors = (tensor.to(dtype) for tensor in (query, key, value))
        case = Case(*tensors, alpha=alpha, scores_are_exact=alpha != 1.3)  # 0.3 times a score rounds
        terms = (query @ key.mT).abs().amax().item()
        case.scale = 2.0 ** round(torch.tensor(largest / terms).log2().item())
        assert largest / 2 < case.scale * terms < largest * 2
        check_attention(case, backend.impl)


@pytest.mark.parametrize("alpha", [1.5, 1.3])
@pytest.mark.parametrize("score", [0.0, 1000.0, -1000.0])
def test_rows_of_equal_scores(backend, alpha, score):
    """The output is the mean of the visible values, and tau lies n^(1 - alpha) below the maximum, with every option."""
    for options in ({}, {"is_causal": True}, {"window_size": (20, 0)}, {"softcap": 3.0}):
        case = make_case(backend, heads=1, length=70, alpha=alpha, scale=1.0, **options)
        case.query, case.key = torch.zeros_like(case.query), torch.zeros_like(case.key)
        case.query[..., 0], case.key[..., 0] = 1.0, score
        result = attend(case, backend.impl, return_support=True)
        count = result[1].size[0, 0].double()
        index = torch.arange(70, device=backend.device)
        seen = {"is_causal": index + 1, "window_size": (index + 1).clamp_max(21)}.get(next(iter(options), ""))
        assert torch.equal(count, (torch.full_like(index, 70) if seen is None else seen).double())
        torch.testing.assert_close(result[1].offset[0, 0].double(), count ** (1 - alpha), rtol=1e-5, atol=1e-7)
        running = case.value[0, 0].double().cumsum(0)
        total = running[-1:].expand(70, -1) if seen is None else running.clone()
        if "window_size" in options:
            total[21:] -= running[:-21]
        torch.testing.assert_close(result[0][0, 0].double(), total / count[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_one_dominant_key(backend, alpha):
    """A key ahead by more than 1 / (alpha - 1) takes it all: the output is its value, bit by bit, the value's gradient
    is the sum of all, and the scores get none."""
    case = make_case(backend, heads=1, length=100, alpha=alpha, scale=1.0)
    case.query[..., 0] = 8.0
    case.key[..., 0] = 0.0
    case.key[:, :, 77] = 0.0
    case.key[:, :, 77, 0] = 100.0
    grad_output = case.grad_output()
    result = run(case, backend.impl, grad_output)
    assert torch.equal(result.output, case.value[:, :, 77:78].expand_as(result.output))
    assert (result.support.size == 1).all()
    expected = torch.zeros_like(case.value)
    expected[:, :, 77] = grad_output.sum(2)
    torch.testing.assert_close(result.gradients[2], expected, rtol=1e-5, atol=1e-5)
    for gradient in result.gradients[:2]:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=2e-3)


def blind_options(device):
    return {
        "key_lengths": {"key_lengths": torch.zeros(1, dtype=torch.int64, device=device)},
        "key_mask": {"key_mask": torch.zeros(1, 70, dtype=torch.bool, device=device)},
        "positions": {"query_positions": -100, "is_causal": True},
        "window": {"query_positions": 1000, "window_size": (5, 5)},
        "block_mask": {
            "block_mask": create_block_mask(lambda b, h, q, k: k < 0, None, None, 70, 70, device=device)
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", blind_options("cpu"))
def test_all_keys_hidden(backend, name):
    """Output and every gradient are exactly 0, those of parameters too; sizes are 0, tau is +inf."""
    alpha, scale, slopes = (torch.tensor([x, x], device=backend.device) for x in (1.4, 0.3, 0.2))
    options = blind_options(backend.device)[name]
    case = make_case(backend, length=70, alpha=alpha, scale=scale, alibi_slopes=slopes, softcap=2.0, **options)
    result = run(case, backend.impl, case.grad_output())
    assert all((tensor == 0).all() for tensor in result.tensors)
    assert (result.support.size == 0).all()
    assert (result.support.tau == torch.inf).all()
    assert not result.support.tiles.any()


def hiding_options(device):
    """Ways to hide the keys from 70 on."""
    hidden = torch.arange(130, device=device)[None] >= 70
    return {
        "key_lengths": {"key_lengths": torch.tensor([70], device=device)},
        "key_mask": {"key_mask": ~hidden},
        "positions": {"query_positions": torch.full((40,), 69, device=device), "is_causal": True},
        "window": {"query_positions": torch.full((40,), 60, device=device), "window_size": (-1, 9)},
        "block_mask": {
            "block_mask": create_block_mask(lambda b, h, q, k: k < 70, None, None, 40, 130, device, BLOCK_SIZE=64)
        },
    }  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", hiding_options("cpu"))
def test_a_hidden_bad_key_changes_nothing(backend, name, bad):
    """Scores of hidden keys are never used: the output is what it is without, to rounding, since a bound may differ."""
    options = hiding_options(backend.device)[name]
    case = make_case(backend, length=40, key_length=130, **options)
    clean = attend(case, backend.impl)
    case.key[:, :, 70:] = bad
    assert_unchanged(attend(case, backend.impl), clean)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_key_behind_an_infinite_slope_changes_nothing(backend, bad):
    """Of whole tiles of queries, and of few. The first keys are at no query's own position."""
    slopes = torch.tensor([torch.inf, torch.inf], device=backend.device)
    for queries in (40, 5):
        case = make_case(backend, length=queries, key_length=130, alibi_slopes=slopes)
        clean = attend(case, backend.impl)
        case.key[:, :, 7] = bad
        assert_unchanged(attend(case, backend.impl), clean)


@pytest.mark.parametrize("name", ["alibi_slopes", "softcap"])
@pytest.mark.parametrize("bad", BAD[:2])
def test_a_bad_visible_key_spoils_its_rows(backend, name, bad):
    """With a bias, NaN and inf in a score reach the rows that see the key, and no others. A cap makes inf finite."""
    options = {"alibi_slopes": torch.tensor([0.1, 0.2], device=backend.device), "softcap": 3.0}
    case = make_case(backend, length=100, is_causal=True, **{name: options[name]})
    case.query, case.key = case.query.abs() + 0.1, case.key.abs() + 0.1
    clean = attend(case, backend.impl)
    case.key[0, 1, 60, 3] = bad
    output = attend(case, backend.impl)
    assert_unchanged(output[0, 0], clean[0, 0])
    assert_unchanged(output[0, 1, :60], clean[0, 1, :60])
    if name == "softcap" and bad == torch.inf:
        assert output.isfinite().all()
    else:
        assert output[0, 1, 60:].isnan().all()


def empty_options(device):
    index = {"device": device, "dtype": torch.int64}
    return {
        "plain": lambda batch, queries, keys: {},
        "causal window": lambda batch, queries, keys: {"is_causal": True, "window_size": (3, 0)},
        "lengths": lambda batch, queries, keys: {"key_lengths": torch.full((batch,), keys, **index)},
        "mask": lambda batch, queries, keys: {"key_mask": torch.ones(batch, keys, dtype=torch.bool, device=device)},
        "positions": lambda batch, queries, keys: {"query_positions": torch.zeros(queries, **index)},
        "softcap": lambda batch, queries, keys: {"softcap": 2.0},
    }


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", empty_options("cpu"))
@pytest.mark.parametrize(
    "extents", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (0, 0, 0, 0)], ids=str
)  # fmt: skip
def test_no_elements(backend, extents, name, learned):
    """Batch, heads, queries or keys of zero: output and gradients of the right shapes, all zero."""
    batch, heads, queries, keys = extents
    options = empty_options(backend.device)[name](batch, queries, keys)
    if learned:
        of_heads = torch.full((heads,), 1.5, device=backend.device)
        options |= {"alpha": of_heads, "scale": of_heads, "alibi_slopes": of_heads}
    case = make_case(backend, batch=batch, heads=heads, length=queries, key_length=keys, **options)
    result = run(case, backend.impl, case.grad_output())
    assert result.output.shape == (batch, heads, queries, 16)
    for tensor, gradient in zip(case.tensors.values(), result.gradients, strict=True):
        assert gradient.shape == tensor.shape
    assert all((tensor == 0).all() for tensor in result.tensors)


@pytest.mark.parametrize("heads", [0, 2])
def test_no_tokens(backend, heads):
    """Packed sequences that are all empty."""
    case = packed_case(backend, (0, 0), heads=heads)
    result = run(case, backend.impl, case.grad_output())
    assert result.output.shape == (0, heads, 16)
    assert all(tensor.numel() == 0 for tensor in result.tensors)


# More than 2^31 elements


def memory() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if HAS_CUDA else 0.0


needs_memory = pytest.mark.skipif(memory() < 60, reason="needs a GPU of 60 GB")
LONG = 2**25 + 64


def planted(key, place):
    """The key at `place` is the only one that a query of ones attends to."""
    key[..., place, :] = 10.0
    return torch.ones_like(key[..., :3, :])


@needs_memory
@pytest.mark.parametrize("place", [5, LONG // 2, LONG - 1])
def test_more_keys_than_32_bits_count(place):
    """2^31 elements and more in one head: the one key that matters is found wherever it stands, its value is the
    output, and its gradient is the only one that is not zero."""
    key = torch.zeros(1, 1, LONG, 64, dtype=torch.bfloat16, device="cuda")
    value = torch.zeros_like(key)
    value[..., place, :] = 3.0
    query = planted(key, place)
    value.requires_grad_()
    output = entmax_attention(query, key, value, is_causal=place == LONG - 1, query_positions=LONG - 1)
    assert torch.equal(output, torch.full_like(output, 3.0))
    (gradient,) = torch.autograd.grad(output.sum(), value)
    assert torch.equal(gradient[..., place, :], torch.full_like(gradient[..., place, :], 3.0))
    gradient[..., place, :] = 0
    assert not gradient.any()


@needs_memory
def test_heads_further_apart_than_32_bits_count():
    """Three heads with 2^31 elements and more between them, of which a slice is used: as contiguous copies."""
    length, dim = 1000, 64
    whole = torch.zeros(3, 2**31 + 64, dtype=torch.bfloat16, device="cuda")
    views = []
    for n, tensor in enumerate(iid_inputs(1, 3, length, dim, dtype=torch.bfloat16, device="cuda")):
        rows = slice(n * length * dim, (n + 1) * length * dim)
        view = whole[:, rows].view(1, 3, length, dim)
        views.append(view.copy_(tensor))
    strided, copied = Case(*views, is_causal=True), Case(*(view.contiguous() for view in views), is_causal=True)
    assert strided.query.stride(1) > 2**31
    grad_output = copied.grad_output()
    results = (run(case, "triton", grad_output).tensors for case in (strided, copied))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 1e-2


def test_a_hidden_bad_key_leaves_rows_without_a_key_alone(backend):
    """Padding on the left, of which one key is NaN: rows that see nothing give 0, and spoil no gradient."""
    query, key, value = iid_inputs(1, 1, 6, 16, device=backend.device)
    key[0, 0, 0] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    seen = torch.tensor([[False, False, True, True, True, True]], device=backend.device)
    output = entmax_attention(*leaves, is_causal=True, key_mask=seen, impl=backend.impl)
    assert (output[0, 0, :2] == 0).all()
    grad_output = torch.ones_like(output)
    grad_output[0, 0, :2] = 0
    _, of_key, of_value = torch.autograd.grad(output, leaves, grad_output)
    assert of_key.isfinite().all()
    assert of_value.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_a_query_without_keys_is_selected(backend, packed, bad):
    """It is 0 whatever comes in for its output, and no other gradient feels it."""
    if packed:
        case = packed_case(backend, (30, 20), spare=10, is_causal=True)
    else:
        case = make_case(backend, length=60, is_causal=True)
        case.options["key_mask"] = (torch.arange(60, device=backend.device) >= 10)[None]
    blind = slice(50, 60) if packed else slice(0, 10)
    clean = case.grad_output()
    dirty = clean.clone()
    case.batched(dirty)[:, :, blind] = bad
    for impl in (backend.impl, "reference"):
        for ours, theirs in zip(run(case, impl, dirty).tensors, run(case, impl, clean).tensors, strict=True):
            assert torch.equal(ours, theirs), impl
