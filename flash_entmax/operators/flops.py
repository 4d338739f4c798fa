"""FLOPs for torch.utils.flop_counter: what the same call of dense attention counts, however sparse this one is.

So utilisation is comparable between attentions; the work that was skipped is in Support.tiles.
"""

from typing import Any

import torch

from . import linear_loss, paged  # noqa: F401  (define the operators)


def register_flop_formulas() -> None:
    """Make ``FlopCounterMode`` count entmax attention as it counts ``scaled_dot_product_attention``.

    Done at ``import flash_entmax`` where ``torch.utils.flop_counter`` is loaded already. Else call this before a
    counter is made: loading that module here would load Triton too. Calling it again changes nothing.
    """
    from torch.utils import flop_counter

    operators = torch.ops.flash_entmax
    if operators.attention in flop_counter.flop_registry:
        return

    @flop_counter.register_flop_formula(operators.attention)
    def forward(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return pairs(query, key) * 2 * (query[-1] + value[-1])

    @flop_counter.register_flop_formula(operators.attention_paged)
    def pages(
        query: torch.Size, key_cache: torch.Size, value_cache: torch.Size, block_table: torch.Size, *_: Any, **__: Any
    ) -> int:  # fmt: skip
        return query[:3].numel() * block_table[1] * key_cache[1] * 2 * (query[-1] + value_cache[-1])

    @flop_counter.register_flop_formula(operators.attention_backward)
    def backward(
        grad_output: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
    ) -> int:  # fmt: skip
        return pairs(query, key) * 2 * (3 * query[-1] + 2 * value[-1])

    @flop_counter.register_flop_formula(operators.attention_tangent)
    def tangent(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return pairs(query, key) * 2 * (3 * query[-1] + 2 * value[-1])

    @flop_counter.register_flop_formula(operators.linear_loss)
    def linear(
        hidden: torch.Size, weight: torch.Size, bias: torch.Size | None, classes: torch.Size, needs_grad_hidden: bool,
        needs_grad_weight: bool, *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        return 2 * hidden[0] * weight[0] * weight[1] * (1 + needs_grad_hidden + needs_grad_weight)


def pairs(query: torch.Size, key: torch.Size) -> int:
    """Of a query and a key, in all heads; a pair takes two operations for each dimension of each product."""
    return query[:3].numel() * key[2]
