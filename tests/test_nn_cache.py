"""The key-value cache of the attention layer: chunks give what the whole sequence gives."""

import pytest
import torch
from conftest import Backend
from test_nn import HEADS, WIDTH, inputs, layer_of

from flash_entmax.nn import EntmaxAttention, KeyValueCache

CPU = Backend("torch", "cpu")
CHUNKS = [1, 3, 16, 40, 2]
LENGTH = sum(CHUNKS)
LAYERS = {
    "none": {"position": "none"},
    "rope, grouped, bias": {"num_key_heads": 2, "bias": True},
    "alibi, long window": {"position": "alibi", "window_size": (200, 3)},
    "nape": {"position": "nape"},
    "window": {"window_size": (5, -1), "position": "nape", "num_key_heads": 1},
    "window of the own token": {"window_size": (0, 0)},
    "adaptive": {"temperature": "adaptive", "position": "nape"},
    "adaptive, learned": {"temperature": "adaptive", "learn_alpha": True, "alpha": 1.3},
    "softmax": {"alpha": 1.0, "window_size": (20, -1)},
    "output norm": {"output_norm": True},
    "softcap, sparsemax": {"softcap": 1.5, "alpha": 2.0, "head_dim": 10},
}


def in_chunks(layer, x, chunks, cache, **options):
    with torch.no_grad():
        return torch.cat([layer(part, cache=cache, **options) for part in x.split(chunks, 1)], 1)


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_are_the_whole_sequence(backend, name):
    batch = backend.sizes(1, 2, 2)
    layer, x = layer_of(backend, **LAYERS[name]), inputs(backend, batch, LENGTH, WIDTH)
    cache = layer.new_cache(batch, LENGTH)
    output = in_chunks(layer, x, CHUNKS, cache, impl=backend.impl)
    with torch.no_grad():
        torch.testing.assert_close(output, layer(x, impl=backend.impl), rtol=1e-4, atol=1e-5)
    assert cache.length == cache.capacity == LENGTH


def test_every_token_by_itself_in_double_precision():
    """Nothing but rounding differs: positions, slopes and temperatures go on behind the cache."""
    for name, options in LAYERS.items():
        torch.manual_seed(0)
        layer, x = EntmaxAttention(WIDTH, HEADS, dtype=torch.float64, **options), torch.randn(2, 20, WIDTH).double()
        output = in_chunks(layer, x, 1, layer.new_cache(2, 20))
        torch.testing.assert_close(output, layer(x).detach(), rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_cache_made_under_inference_mode_serves_under_no_grad():
    layer, x = EntmaxAttention(WIDTH, HEADS), torch.randn(1, 6, WIDTH)
    with torch.inference_mode():
        cache = layer.new_cache(1, 6)
        first = layer(x[:, :4], cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat((first, layer(x[:, 4:], cache=cache)), 1), layer(x))


def test_a_cache_that_is_reset_is_as_new(backend):
    layer, x = layer_of(backend), inputs(backend, 2, 9, WIDTH)
    cache = layer.new_cache(2, 9)
    first = in_chunks(layer, x, 9, cache, impl=backend.impl)
    cache.reset()
    assert cache.length == 0
    again = in_chunks(layer, x, 9, cache, impl=backend.impl)
    assert torch.equal(first, again)


def test_alpha_of_a_call(backend):
    layer, x = layer_of(backend), inputs(backend, 1, 9, WIDTH)
    output = in_chunks(layer, x, [4, 5], layer.new_cache(1, 9), alpha=1.9, impl=backend.impl)
    torch.testing.assert_close(output, layer(x, alpha=1.9, impl=backend.impl).detach(), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_goes_on_behind_its_cache():
    """Once lengths are seen to differ, a new one compiles nothing."""
    torch._dynamo.reset()
    layer, x = layer_of(CPU, num_key_heads=2), inputs(CPU, 2, 12, WIDTH)
    compiled, cache = torch.compile(layer, fullgraph=True, backend="aot_eager"), layer.new_cache(2, 16)
    parts = [in_chunks(compiled, x[:, :8], [4, 1, 1, 1, 1], cache)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        parts.append(in_chunks(compiled, x[:, 8:], 1, cache))
    torch.testing.assert_close(torch.cat(parts, 1), layer(x).detach(), rtol=1e-4, atol=1e-5)


def test_keys_of_a_step_are_those_of_the_cache():
    """Nothing is copied but what is new."""
    cache = KeyValueCache(2, 1, 8, 4, device=torch.device("cpu"), dtype=torch.float32)
    cache.write(torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4))
    assert cache.length == 0
    keys, values = cache.append(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    assert cache.length == 3
    assert (keys == 1).all()
    assert (keys.data_ptr(), values.data_ptr()) == (cache.keys.data_ptr(), cache.values.data_ptr())
    assert keys.shape == values.shape == (2, 1, 3, 4)


def test_dtypes(backend):
    """By default those of the layer, or of autocast."""
    layer, x = layer_of(backend), inputs(backend, 1, 5, WIDTH)
    assert layer.new_cache(1, 5).keys.dtype == torch.float32
    assert layer.new_cache(1, 5, dtype=torch.float16, device="cpu").values.dtype == torch.float16
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        cache = layer.new_cache(1, 5)
        assert cache.keys.dtype == torch.bfloat16
        if backend.impl == "torch":
            assert in_chunks(layer, x, 2, cache, impl="torch").isfinite().all()
    with torch.no_grad(), pytest.raises(TypeError, match=r"key must have the dtype of the cache, torch\.bfloat16, got"):
        layer(x, cache=cache)


def test_refusals_leave_the_cache_as_it_was():
    layer, x = EntmaxAttention(WIDTH, HEADS), torch.ones(2, 3, WIDTH)
    cache = layer.new_cache(2, 4)
    with torch.no_grad():
        layer(x, cache=cache)
        kept = cache.keys.clone()
        with pytest.raises(ValueError, match=r"room for 4 tokens: it holds 3, and 3 more were given\. Make a larger"):
            layer(x, cache=cache)
        with pytest.raises(ValueError, match=r"key must fit the cache, of shape \(2, 4, tokens, 6\), got \(1, 4, 1, 6"):
            layer(x[:1, :1], cache=cache)
        with pytest.raises(ValueError, match="key_mask, cu_seq, max_seq and nested tensors have no place beside it"):
            layer(x[:, :1], cache=cache, key_mask=torch.ones(2, 1) > 0)
        with pytest.raises(ValueError, match=r"alpha must be 1 \(softmax\), or from .* got 3"):
            layer(x[:, :1], cache=cache, alpha=3.0)
        with pytest.raises(TypeError, match="cache must be a KeyValueCache, which new_cache makes, got dict"):
            layer(x, cache={})
        with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got NoneType"):
            cache.append(None, None)
        for length, error, words in ((-1, ValueError, "capacity of the cache, 4, got -1"), (5, ValueError, "got 5"),
                                     (2.5, TypeError, "length must be an integer, got float 2.5")):  # fmt: skip
            with pytest.raises(error, match=words):
                cache.length = length
    with pytest.raises(ValueError, match=r"a cache holds no gradients: write under torch\.no_grad\(\)"):
        cache.append(*(torch.ones(2, HEADS, 1, layer.head_dim, requires_grad=True) for _ in range(2)))
    with pytest.raises(ValueError, match=r"a cache holds no gradients: call the layer under torch\.no_grad\(\)"):
        layer(x[:, :1], cache=cache)
    assert cache.length == 3
    assert torch.equal(cache.keys[:, :, :3], kept[:, :, :3])


def test_tokens_are_taken_back(backend):
    """As drafts that were rejected: what follows stands in their place."""
    layer, x = layer_of(backend), inputs(backend, 2, 9, WIDTH)
    cache = layer.new_cache(2, 9)
    in_chunks(layer, torch.cat((x[:, :4], -x[:, 4:7]), 1), [4, 3], cache, impl=backend.impl)
    cache.length = 4
    rest = in_chunks(layer, x[:, 4:], 5, cache, impl=backend.impl)
    torch.testing.assert_close(rest, layer(x, impl=backend.impl)[:, 4:].detach(), rtol=1e-4, atol=1e-5)


def test_refusals_of_a_new_cache():
    with pytest.raises(ValueError, match=r"device must be a torch\.device or its name, .* got 'nowhere'"):
        EntmaxAttention(WIDTH, HEADS).new_cache(1, 4, device="nowhere")
    with pytest.raises(TypeError, match=r"dtype must be one of torch\.float16, .* got torch\.int32"):
        EntmaxAttention(WIDTH, HEADS).new_cache(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="a cache is for a causal layer, got is_causal=False"):
        EntmaxAttention(WIDTH, HEADS, is_causal=False).new_cache(1, 4)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        EntmaxAttention(WIDTH, HEADS).new_cache(1, 0)
    with pytest.raises(TypeError, match=r"batch must be an integer, got 1\.5"):
        EntmaxAttention(WIDTH, HEADS).new_cache(1.5, 4)
