"""alpha = 1 is softmax: PyTorch's own attention, with this library's causal alignment."""

import time
from itertools import pairwise
from threading import Thread

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention, entmax_attention_varlen
from flash_entmax.backends import BACKENDS, softmax
from flash_entmax.testing import iid_inputs

each_impl = pytest.mark.parametrize("impl", ["auto", "torch", "reference"])


@each_impl
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_pytorch(impl, scale):
    query, key, value = iid_inputs(2, 4, 50, 16, key_length=70, key_heads=2, value_dim=8)
    expected = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    actual = entmax_attention(query, key, value, alpha=1.0, scale=scale, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entmax_attention(query, key, value, alpha=1, scale=scale, impl=impl), expected)


@each_impl
def test_causal_equals_pytorch_at_equal_lengths(impl):
    query, key, value = iid_inputs(1, 2, 60, 16)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    actual = entmax_attention(query, key, value, alpha=1.0, is_causal=True, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 2, 5, 6), (2, 0, 5, 6), (1, 2, 0, 6), (1, 2, 5, 0)])
@pytest.mark.parametrize("options", [{}, {"window_size": (2, 0)}], ids=["plain", "window"])
def test_empty(shape, options):
    """Zeros, also of queries that are NaN."""
    batch, heads, queries, keys = shape
    query, key, value = (torch.full((batch, heads, length, 8), torch.nan) for length in (queries, keys, keys))
    inputs = query.requires_grad_(), key.requires_grad_(), value[..., :3].clone().requires_grad_()
    output = entmax_attention(*inputs, alpha=1.0, **options)
    assert output.shape == (batch, heads, queries, 3)
    for tensor in (output, *torch.autograd.grad(output.sum(), inputs)):
        assert (tensor == 0).all()
    scale = torch.ones(heads, requires_grad=True)
    output = entmax_attention(*(tensor.detach() for tensor in inputs), alpha=1.0, scale=scale, **options)
    assert torch.autograd.grad(output.sum(), scale)[0].shape == scale.shape


@each_impl
@pytest.mark.parametrize(("queries", "keys"), [(40, 70), (70, 40), (1, 9), (9, 1)])
def test_causal_mask_is_aligned_to_the_lower_right(impl, queries, keys):
    query, key, value = (t.requires_grad_() for t in iid_inputs(1, 4, queries, 8, key_length=keys, key_heads=2))
    output = entmax_attention(query, key, value, alpha=1.0, is_causal=True, impl=impl)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    scores = wide[0] @ wide[1].repeat_interleave(2, 1).mT / 8**0.5
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    expected = weights @ wide[2].repeat_interleave(2, 1)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    assert (output[:, :, : max(0, queries - keys)] == 0).all()
    gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def masks(queries, keys):
    """Options beside the dense mask and the distances that they stand for."""
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    lengths, padding = torch.tensor([20, keys]), torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    padding[0] = False
    apart = (place - key).abs()
    shuffled = torch.arange(queries).flip(0)
    return {
        "window": ({"window_size": (9, 4)}, (key >= place - 9) & (key <= place + 4), apart),
        "causal window": ({"window_size": (9, -1), "is_causal": True}, (key >= place - 9) & (key <= place), apart),
        "lengths": (
            {"key_lengths": lengths, "query_positions": keys - queries}, (key < lengths[:, None])[:, None, None], apart,
        ),
        "key mask": ({"key_mask": padding}, padding[:, None, None], apart),
        "positions": (
            {"query_positions": shuffled, "is_causal": True}, key <= shuffled[:, None], (shuffled[:, None] - key).abs(),
        ),
        "block mask": (
            {"block_mask": create_block_mask(lambda b, h, q, k: (q + k) % 3 > 0, None, None, queries, keys, "cpu")},
            (torch.arange(queries)[:, None] + key) % 3 > 0, apart,
        ),
    }  # fmt: skip


@each_impl
@pytest.mark.parametrize("name", masks(1, 1))
@pytest.mark.parametrize("slopes", [None, [0.5, 0.1], [[0.5, 0.1], [0.0, 0.2]]], ids=["none", "by head", "by row"])
def test_masks_and_slopes_equal_a_dense_mask(impl, name, slopes):
    """Every option means the same as above alpha = 1; a query that sees no key gets output 0 and gradient 0."""
    query, key, value = leaves = [t.requires_grad_() for t in iid_inputs(2, 2, 50, 8, key_length=60)]
    options, visible, apart = masks(50, 60)[name]
    if slopes is not None:
        slopes = torch.tensor(slopes, requires_grad=True)
        options, leaves = options | {"alibi_slopes": slopes}, [*leaves, slopes]
    output = entmax_attention(query, key, value, alpha=1.0, impl=impl, **options)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    scores = wide[0] @ wide[1].mT / 8**0.5
    if slopes is not None:
        scores = scores - wide[3].view(-1, 2, 1, 1) * apart
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    expected = weights @ wide[2]
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


WIDE_CASES = {
    "recent keys are masked": {"key_mask": torch.arange(200)[None] < 60, "alibi_slopes": torch.tensor([0.7, 0.3])},
    "a late chunk": {"query_positions": 2000, "is_causal": True, "alibi_slopes": torch.tensor([0.7, 0.3])},
    "a very late chunk": {"query_positions": 150_000, "is_causal": True, "alibi_slopes": torch.tensor([0.5, 0.5])},
    "a tensor scale": {"scale": torch.tensor(0.7)},
    "a large scale": {"scale": torch.tensor([1e5, 0.3])},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WIDE_CASES)
def test_penalties_and_scales_that_do_not_fit_16_bits(name, dtype):
    inputs = [tensor.to(dtype) for tensor in iid_inputs(1, 2, 200, 64)]
    output = entmax_attention(*inputs, alpha=1.0, **WIDE_CASES[name])
    assert output.dtype == dtype
    exact = entmax_attention(*(t.double() for t in inputs), alpha=1.0, impl="reference", **WIDE_CASES[name])
    torch.testing.assert_close(output.double(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("slope", [4e37, 3.4e38, torch.inf])
def test_slopes_that_no_distance_can_multiply(slope):
    """The nearest key that is seen loses nothing beside the others."""
    inputs, options = iid_inputs(1, 1, 8, 16), {"query_positions": 12, "is_causal": True, "alpha": 1.0}
    slopes = torch.tensor([slope])
    exact = entmax_attention(*(t.double() for t in inputs), alibi_slopes=slopes, impl="reference", **options)
    torch.testing.assert_close(entmax_attention(*inputs, alibi_slopes=slopes, **options).double(), exact)


FLASH, EFFICIENT, MATH, CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)


def enabled_backends():
    flags = torch.backends.cuda
    enabled = {
        FLASH: flags.flash_sdp_enabled(),
        EFFICIENT: flags.mem_efficient_sdp_enabled(),
        MATH: flags.math_sdp_enabled(),
        CUDNN: flags.cudnn_sdp_enabled(),
    }
    return {backend for backend, is_enabled in enabled.items() if is_enabled}


class SaysThatItIsOnTheGpu(torch.Tensor):
    is_cuda = True


def call_as_on_a_gpu(monkeypatch, attention, *, training=True, **options) -> None:
    """With ``attention`` in place of PyTorch's."""
    monkeypatch.setattr(softmax, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(BACKENDS["triton"], "obstacle", lambda *_: "")
    query = torch.zeros(1, 2, 64, 16).as_subclass(SaysThatItIsOnTheGpu).requires_grad_(training)
    entmax_attention(query, query[:, :1], query[:, :1], alpha=1.0, is_causal=True, **options)


@pytest.mark.parametrize(
    ("enabled", "options", "expected"),
    [
        ({FLASH, EFFICIENT, MATH, CUDNN}, {}, {FLASH, EFFICIENT, MATH, CUDNN}),
        ({FLASH, EFFICIENT, MATH, CUDNN}, {"window_size": (9, 0)}, {FLASH, EFFICIENT, MATH}),
        ({FLASH, CUDNN}, {"window_size": (9, 0), "training": False}, {FLASH, CUDNN}),
        ({MATH, CUDNN}, {"window_size": (9, 0)}, {MATH}),
        ({CUDNN}, {"window_size": (9, 0)}, {CUDNN}),
    ],
)
def test_masks_do_not_go_to_cudnn_in_training(monkeypatch, enabled, options, expected):
    """On a GPU; shown without one, by a tensor that says it is there."""
    seen = []

    def attention(query, key, value, enable_gqa=False, **options):
        seen.append(enabled_backends())
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert not enable_gqa or "attn_mask" not in options  # which do not go together there
        return query

    with sdpa_kernel(list(enabled)):
        call_as_on_a_gpu(monkeypatch, attention, **options)
        assert enabled_backends() == enabled
    assert seen == [expected]


def test_threads_leave_the_backends_as_they_were(monkeypatch):
    """They are the process's: one call must not take what another has set for what is to be restored."""
    before, seen = enabled_backends(), []

    def attention(query, *rest, **options):
        time.sleep(0.05)
        seen.append(enabled_backends())
        return query

    threads = [
        Thread(target=call_as_on_a_gpu, args=(monkeypatch, attention), kwargs={"window_size": (9, 0)}) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert seen == 3 * [before - {CUDNN}]
    assert enabled_backends() == before


def test_the_choice_of_backends_compiles():
    def attend(query):
        return softmax.with_backends(softmax.other_backends(), scaled_dot_product_attention, query, query, query)

    query = torch.randn(1, 2, 8, 16)
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(query), attend(query))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_slopes_compile():
    def attend(query, slopes):
        return entmax_attention(query, query, query, alpha=1.0, is_causal=True, alibi_slopes=slopes)

    query = torch.randn(1, 2, 2048, 64, device="cuda", dtype=torch.bfloat16)
    slopes = torch.tensor([0.5, 0.0], device="cuda")
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)(query, slopes)
    torch.testing.assert_close(compiled, attend(query, slopes), rtol=0.02, atol=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [64, 128, 192, 200])
def test_gradients_are_finite_where_all_scores_are_low(length):
    """With a mask cuDNN's gradient is NaN at 64 and 192, where exp(-score) is no float32 any more."""
    query, key, value = (t.to(torch.bfloat16) for t in iid_inputs(1, 2, length, 64, device="cuda"))
    query[..., 0], key[..., 0] = 1.0, -120 * 8.0
    query, key, value = (t.requires_grad_() for t in (query, key, value))
    output = entmax_attention(query, key, value, alpha=1.0, is_causal=True, window_size=(50, 0))
    for gradient in torch.autograd.grad(output.square().sum(), (query, key, value)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_softcap_is_refused(impl):
    with pytest.raises(ValueError, match=r"softcap with alpha=1 .*FlexAttention"):
        entmax_attention(*iid_inputs(1, 1, 5, 8), alpha=1.0, softcap=1.0, impl=impl)


@each_impl
def test_packed_sequences_are_alone(impl):
    query, key, value = (t[0].transpose(0, 1) for t in iid_inputs(1, 2, 40, 8))
    cu_seq = torch.tensor([0, 7, 7, 30])
    output = entmax_attention_varlen(query, key, value, cu_seq, None, 23, 23, alpha=1.0, is_causal=True, impl=impl)
    assert (output[30:] == 0).all()
    for rows in (slice(0, 7), slice(7, 30)):
        alone = (tensor[rows].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        expected = scaled_dot_product_attention(*alone, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(output[rows], expected, rtol=1e-5, atol=1e-6)


@each_impl
def test_small_alpha_comes_close(impl):
    query, key, value = iid_inputs(1, 2, 70, 16, dtype=torch.float64)
    softmax = entmax_attention(query, key, value, alpha=1.0, impl=impl)
    errors = [
        (entmax_attention(query, key, value, alpha=alpha, impl=impl) - softmax).abs().max().item()
        for alpha in (1.1, 1.01, 1.001, 1.0001)
    ]
    ratios = [larger / smaller for larger, smaller in pairwise(errors)]
    assert ratios == pytest.approx([10] * 3, rel=0.2)  # the error is of first order in alpha - 1
    assert errors[-1] < 1e-3


def test_a_causal_window_is_aligned_to_the_lower_right():
    query, key, value = iid_inputs(1, 1, 3, 8, key_length=7)
    windowed = entmax_attention(query, key, value, alpha=1.0, window_size=(-1, 0))
    torch.testing.assert_close(windowed, entmax_attention(query, key, value, alpha=1.0, is_causal=True))
