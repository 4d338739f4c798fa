"""A few calls that use every kernel and option once, for compute-sanitizer:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

Without the cache each tensor is an allocation of its own, so that a step past its end is seen.
"""

import torch
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax import KeySummaries, entmax_attention, entmax_attention_paged, entmax_attention_varlen
from flash_entmax.testing import iid_inputs, key_sparse_inputs

ON_GPU = {"dtype": torch.bfloat16, "device": "cuda"}


def step(attention, *tensors: torch.Tensor, **options) -> None:
    """Forward, support and backward, by every tensor that can have a gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    learned = {name: o.requires_grad_() for name, o in options.items() if name in ("alpha", "scale", "alibi_slopes")}
    output, _ = attention(*leaves, **options, impl="triton", return_support=True)
    gradients = torch.autograd.grad(output.sum(), [*leaves, *learned.values()])
    torch.cuda.synchronize()
    assert all(gradient.isfinite().all() for gradient in gradients)


def inputs(length: int, dim: int, dtype=torch.bfloat16, batch: int = 2, **options):
    return iid_inputs(batch, 4, length, dim, key_heads=2, dtype=dtype, device="cuda", **options)


def packed(query, key, value, **options):
    boundaries = torch.tensor([0, 70, 70, 75, 190], dtype=torch.int32, device="cuda")
    tensors = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return entmax_attention_varlen(*tensors, boundaries, None, 115, 115, **options)


@torch.no_grad()
def decode(queries: int, keys: int, dim: int, dtype=torch.bfloat16, **options) -> None:
    """Few queries of keys in one piece, in pages, and by keys in 8 bits."""
    query, key, value = iid_inputs(2, 4, queries, dim, key_heads=2, key_length=keys, dtype=dtype, device="cuda")
    lengths = torch.tensor([keys - 5, keys // 3], device="cuda")
    masks = {"key_lengths": lengths, "query_positions": keys - queries}
    results = [entmax_attention(query, key, value, **masks, impl="triton", **options)]
    for skips_blocks in (False, True):
        summaries = KeySummaries.of(key, skips_blocks=skips_blocks)
        results.append(entmax_attention(query, key, value, **masks, key_summary=summaries, **options))
    caches = (tensor.transpose(1, 2).reshape(-1, 16, 2, dim) for tensor in (key, value))
    table = torch.arange(2 * keys // 16, dtype=torch.int32, device="cuda").view(2, -1)
    results.append(entmax_attention_paged(query, *caches, table, lengths, impl="triton", **options))
    torch.cuda.synchronize()
    assert all(result.isfinite().all() for result in results)


def main() -> None:
    heads = torch.tensor([1.2, 1.5, 1.8, 2.0], device="cuda")
    slopes = torch.tensor([0.5, 0.25, 0.0, -0.01], device="cuda")
    key_mask = torch.arange(150, device="cuda").remainder(7).gt(2).expand(2, -1)
    block_mask = create_block_mask(lambda b, h, q, k: (q - k).abs() % (h + 2) == 0, 1, 4, 200, 200, device="cuda")
    step(entmax_attention, *inputs(200, 64), is_causal=True)
    # Few queries of a tile reach a tile of keys: single keys, lists of queries, and parts of sinks.
    step(entmax_attention, *key_sparse_inputs("sink", 1, 4, 2_304, 64, key_heads=2, **ON_GPU), is_causal=True)
    step(entmax_attention, *inputs(2_304, 64, batch=1), is_causal=True)
    step(entmax_attention, *inputs(131, 128, torch.float16, key_length=77), is_causal=True)
    step(entmax_attention, *inputs(100, 40, torch.float32), alpha=heads, softcap=5.0)
    step(packed, *inputs(200, 64, batch=1), window_size=(50, 3), alibi_slopes=slopes)
    step(entmax_attention, *inputs(150, 64), key_mask=key_mask, key_lengths=torch.tensor([150, 60], device="cuda"))
    step(entmax_attention, *inputs(200, 64), block_mask=block_mask, alpha=heads, alibi_slopes=slopes, softcap=20.0)
    decode(1, 2_304, 128)
    decode(16, 144, 64, torch.float16, alpha=heads, softcap=5.0, alibi_slopes=slopes)
    decode(3, 2_304, 64, scale=1e-3)  # a support of many parts
    print("done")


if __name__ == "__main__":
    main()
