"""Every refusal of a call with keys in pages, before any kernel runs; see checks.py."""

from torch import Tensor

from .call import ScoreOptions
from .checks import (
    check_devices_and_dtypes,
    check_heads,
    check_index,
    check_longest,
    check_score_options,
    check_window,
    require_dense,
)
from .modes import is_recorded


def check_paged_inputs(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, key_lengths: Tensor,
    cu_seq_q: Tensor | None, max_q: int | None, score: ScoreOptions, window: tuple[int, int],
) -> None:  # fmt: skip
    check_caches(query, key_cache, value_cache, is_packed=cu_seq_q is not None)
    check_table(query, block_table, key_lengths, cu_seq_q, max_q)
    check_score_options(query if cu_seq_q is None else query.transpose(0, 1).unsqueeze(0), score)
    check_window(window)
    refuse_derivatives(
        query=query, key_cache=key_cache, value_cache=value_cache, alpha=score.alpha, scale=score.scale,
        alibi_slopes=score.alibi_slopes,
    )  # fmt: skip


def check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor, is_packed: bool) -> None:
    """Tensors of one floating dtype and device, whose shapes fit."""
    tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache}
    shapes = dict.fromkeys(tensors, "(pages, page size, key heads, dim)")
    packed = "(tokens, heads, dim) beside cu_seq_q"
    shapes["query"] = packed if is_packed else f"(batch, heads, queries, dim), or {packed}"
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        require_dense(name, tensor)
        if tensor.dim() != (3 if name == "query" and is_packed else 4):
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}")
    check_devices_and_dtypes(tensors)
    if key_cache.shape[:3] != value_cache.shape[:3]:
        got = f"{tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
        raise ValueError(f"key_cache and value_cache must have the same pages, page size and key heads, got {got}")
    if 0 in key_cache.shape[:2]:
        raise ValueError(f"key_cache must have at least one page of at least one key, got {tuple(key_cache.shape)}")
    check_heads(query.shape[1], key_cache.shape[2], query.shape[-1], key_cache.shape[3], value_cache.shape[3])


def check_table(
    query: Tensor, block_table: Tensor, key_lengths: Tensor, cu_seq_q: Tensor | None, max_q: int | None
) -> None:
    """What says which keys and queries a batch row has: shapes, dtypes and numbers."""
    check_index("block_table", block_table, query, None)
    if block_table.dim() != 2 or block_table.shape[1] == 0:
        raise ValueError(
            f"block_table must have shape (batch, pages of a row), with at least one page, got "
            f"{tuple(block_table.shape)}"
        )
    batch = block_table.shape[0]
    check_index("key_lengths", key_lengths, query, ((batch,),))
    if cu_seq_q is None:
        if max_q is not None:
            raise ValueError(f"max_q is for packed queries, beside cu_seq_q, got {max_q}")
        if query.shape[0] != batch:
            raise ValueError(f"query and block_table must have one batch size, got {query.shape[0]} and {batch}")
        return
    check_index("cu_seq_q", cu_seq_q, query, ((batch + 1,),))
    if max_q is None:
        raise ValueError("max_q, at least the most queries of a row, must be given beside cu_seq_q, got None")
    check_longest("max_q", max_q, least=1)


def refuse_derivatives(**tensors: object) -> None:
    """There is no gradient, and no other derivative."""
    recorded = [name for name, tensor in tensors.items() if is_recorded((tensor,))]
    if recorded:
        raise ValueError(
            f"attention over keys in pages has no derivatives, got {', '.join(recorded)} that may need them: call it "
            "under torch.no_grad(), or detach them"
        )
