"""A user's code as a type checker sees it. `make lint` checks this file, and nothing runs it.

Each `type: ignore` marks a mistake that a type checker must find: one that it does not find is reported as unused.
"""

import torch
from torch import Tensor
from typing_extensions import assert_type

import flash_entmax
from flash_entmax import (
    Impl,
    KeySummaries,
    KeySummary,
    Support,
    entmax,
    entmax15_loss,
    entmax_attention,
    entmax_attention_paged,
    entmax_attention_varlen,
    entmax_loss,
    linear_entmax_loss,
    sparsemax,
    summarise_keys,
)
from flash_entmax.anneal import AlphaAnnealing
from flash_entmax.distributed import context_parallel_attention, positions, shard
from flash_entmax.inspection import RecordedCall, attention_rows, record
from flash_entmax.nn import Entmax, EntmaxAttention, EntmaxLoss, KeyValueCache


def attention(query: Tensor, key: Tensor, value: Tensor, wants_support: bool, impl: Impl) -> Tensor:
    output = entmax_attention(
        query, key, value, alpha=torch.tensor(1.5), is_causal=True, window_size=(64, 0), impl=impl
    )
    assert_type(output, Tensor)
    assert_type(entmax_attention(query, key, value, return_support=False), Tensor)
    assert_type(entmax_attention(query, key, value, return_support=wants_support), Tensor | tuple[Tensor, Support])
    output, support = entmax_attention(query, key, value, return_support=True)
    assert_type(support, Support)
    assert_type(support.tau, Tensor)
    entmax_attention(query, key, value, is_casual=True)  # type: ignore[call-overload]
    entmax_attention(query, key, value, alpha="1.5")  # type: ignore[call-overload]
    entmax_attention(query, key, value, impl="cuda")  # type: ignore[call-overload]
    entmax_attention(query, key, value, return_support=True).sum()  # type: ignore[attr-defined]
    return output


def packed(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> tuple[Tensor, Support]:
    output = entmax_attention_varlen(query, key, value, boundaries, None, 100, 100, scale=0.1)
    assert_type(output, Tensor)
    entmax_attention_varlen(query, key, value, boundaries, None, 100)  # type: ignore[call-overload]
    return entmax_attention_varlen(query, key, value, boundaries, boundaries, 100, 100, return_support=True)


def generation(query: Tensor, key: Tensor, value: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    summary = summarise_keys(key)
    assert_type(summary, KeySummary)
    summaries = KeySummaries.of(key, capacity=4096)
    assert_type(summaries, KeySummaries)
    summaries.append(key[:, :, :1])
    entmax_attention(query, key, value, key_summary=summary)
    entmax_attention(query, key, value, key_summary=summaries)
    return entmax_attention_paged(query, key, value, table, lengths)


def activations_and_losses(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    assert_type(entmax(x, 1.5), Tensor)
    assert_type(sparsemax(x, -1), Tensor)
    loss = entmax_loss(x, target, 1.5, reduction="sum") + linear_entmax_loss(x, weight, target)
    entmax15_loss(x, target, alpha=1.5)  # type: ignore[call-arg]
    return loss + entmax15_loss(x, target, label_smoothing=0.1)


def modules(x: Tensor, target: Tensor) -> float:
    layer = EntmaxAttention(512, 8, learn_alpha=True, dtype=torch.bfloat16)
    assert_type(layer.new_cache(1, 64), KeyValueCache)
    annealing = AlphaAnnealing(1000)
    layer(x, alpha=annealing.alpha)
    Entmax(learn_alpha=True)(x)
    EntmaxLoss(1.5)(x, target)
    EntmaxAttention(512, "8")  # type: ignore[arg-type]
    return annealing.step()


def seeing(model: torch.nn.Module, query: Tensor, key: Tensor) -> Tensor:
    with record(model) as calls:
        model(query)
    assert_type(calls, list[RecordedCall])
    assert_type(calls[0].key_sparsity, Tensor)
    return attention_rows(query, key, alpha=1.5)


def several_processes(query: Tensor, key: Tensor, value: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    assert_type(positions(1024, group), Tensor)
    parts = [shard(tensor, 2, group) for tensor in (query, key, value)]
    context_parallel_attention(*parts)  # type: ignore[call-arg]
    return context_parallel_attention(parts[0], parts[1], parts[2], group=group, is_causal=True)


assert_type(flash_entmax.__version__, str)
