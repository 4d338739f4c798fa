"""The attention function that Transformers calls in each layer: check, lower to options of this library, call."""

from typing import Any

from torch import Tensor, nn

from ...core.call import ScoreOptions
from ...core.keywords import SINKS
from ...core.visibility import Visibility
from ...functional import attend, entmax_attention_varlen
from .alpha import alpha_of
from .construction import note_call
from .masks import Mask, mask_of

# Options that models pass to attention functions and that leave the attention as it is. A model may add its own. Any
# other option that is not None is refused, because an option that is ignored in silence changes the model.
HARMLESS = {
    "cache_position", "deterministic", "encoder_hidden_states", "kernel_options", "layer_idx", "mm_token_type_ids",
    "num_items_in_batch", "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "seq_idx", "shift_labels", "token_type_ids", "use_cache",
}  # fmt: skip

# Options that entmax does not have, and what to do instead.
REFUSED = {
    "cache": "paged attention (continuous batching) needs another implementation, such as 'sdpa'",
    "head_mask": "entmax has no mask of whole heads: prune the heads instead",
    "output_attentions": "the probabilities are never stored; record(model) of flash_entmax.inspection shows them",
    "position_bias": "biases added to the scores are not supported: use attn_implementation='eager'",
    "s_aux": SINKS,
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Mask | Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    *,
    alpha: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """What Transformers calls in each layer.

    The mask decides, as for ``"eager"``. ``is_causal`` and ``sliding_window`` count only where the model makes no mask.
    ``cu_seq_lens_q`` and ``cu_seq_lens_k`` pack the tokens of all rows, as for FlashAttention.

    Args:
        query, key, value: (batch, heads or key heads, length, dim).
        alpha: a number; None for the alpha of the model.

    Returns:
        (batch, query length, heads, dim), and None for the probabilities, which are not stored.

    Raises:
        ValueError: an option that entmax does not have, or that is not known; see HARMLESS.
        RuntimeError: the model was built before :func:`register`.
    """
    note_call(module)
    check_options(module, dropout, options)
    mask = mask_of(module, attention_mask, query, key, is_causal, sliding_window)
    alpha = alpha_of(module, query.device) if alpha is None else alpha
    if mask.parallel is not None:
        if cu_seq_lens_q is not None:
            raise ValueError("cu_seq_lens_q was passed, but context_parallel packs sequences by position_ids")
        output = mask.parallel.attention(
            query, key, value, alpha=alpha, scale=scaling, softcap=softcap or 0.0, window_size=mask.window,
            key_mask=mask.key_mask, cu_seq=mask.boundaries,
        )  # fmt: skip
        return output.transpose(1, 2).contiguous(), None
    packing = _packing_of(mask, query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    score = ScoreOptions(alpha, scaling, softcap or 0.0)
    if packing is not None:
        tokens = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        output = entmax_attention_varlen(*tokens, *packing, window_size=mask.window, **score._asdict())
        return output.unflatten(0, (query.shape[0], query.shape[2])), None
    output = attend(query, key, value, score, visibility_of(mask), "auto", False)
    return output.transpose(1, 2).contiguous(), None


def visibility_of(mask: Mask) -> Visibility:
    """The options of a mask that packs no sequences."""
    return Visibility(
        window_size=mask.window, query_positions=mask.positions, key_mask=mask.key_mask, block_mask=mask.block_mask,
        known_intervals=mask.intervals,
    )  # fmt: skip


def check_options(module: nn.Module, dropout: float, options: dict[str, Any]) -> None:
    """Refuse every option that is neither absent nor in HARMLESS."""
    if dropout:
        raise ValueError(
            f"attention dropout is not supported, got {dropout}: set it to 0 in the config (attention_dropout, "
            "attention_probs_dropout_prob or attn_pdrop, by model)"
        )
    wants_probabilities = getattr(getattr(module, "config", None), "output_attentions", False)
    for name, value in ({"output_attentions": wants_probabilities} | options).items():
        if name in HARMLESS or value is None or value is False:
            continue
        if name in REFUSED:
            raise ValueError(f"{name} was passed, got {type(value).__name__}: {REFUSED[name]}")
        raise ValueError(
            f"{name} is not known to this attention, got {type(value).__name__}: if it leaves the attention as it is, "
            f"say so by flash_entmax.integrations.transformers.HARMLESS.add({name!r})"
        )


def _packing_of(
    mask: Mask,
    query: Tensor,
    key: Tensor,
    boundaries_q: Tensor | None,
    boundaries_k: Tensor | None,
    longest_q: int | None,
    longest_k: int | None,
) -> tuple[Tensor, Tensor | None, int, int] | None:
    """Boundaries and longest lengths of queries and keys, where sequences are packed: by the call, or by the mask."""
    if boundaries_q is None:
        return None if mask.boundaries is None else (mask.boundaries, None, key.shape[2], key.shape[2])
    if mask.hides_padding or any(part is not None for part in (mask.positions, mask.key_mask, mask.block_mask)):
        raise ValueError("cu_seq_lens_q packs sequences without padding, cache or 4-D mask: pass it without them")
    tokens = query.shape[0] * key.shape[2]
    longest = (length if isinstance(length, int) else tokens for length in (longest_q, longest_k))
    return boundaries_q, boundaries_k, *longest
