"""Entmax attention in the models of Transformers, version 5.4 and later.

::

    from flash_entmax.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="entmax15")

``"entmax15"`` is alpha 1.5, ``"sparsemax"`` alpha 2, and ``"entmax"`` takes alpha from ``config.entmax_alpha``, which
:func:`set_alpha` sets. What is saved has its attention and its alpha: a plain ``from_pretrained(folder)`` after
``register()`` builds the same model, and without ``register()`` it is an error of Transformers.

The model's own masks decide what a query sees, exactly as with ``"eager"``: padding on either side, packed sequences,
windows, any cache. Causal, bidirectional, windowed and packed attention become options of
:func:`entmax_attention`, which skips what they hide and works inside ``torch.compile``. Any other mask (chunks, image
blocks, functions of one's own, 4-D masks) is evaluated densely into a FlexAttention ``BlockMask``: exact as well, but
outside of ``torch.compile`` only.

A query that sees no key, such as left padding, gets output 0.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ...functional import entmax_attention, entmax_attention_varlen
from .alpha import alpha_of, set_alpha
from .config import IMPLEMENTATIONS, implementation_of, is_undeclared, saved_attention
from .construction import note_caller, prepare_built, watch_construction
from .masks import Mask, mask, sight_of

__all__ = ["HARMLESS", "Mask", "attention", "mask", "register", "saved_attention", "set_alpha"]

# What models pass on to attention functions that leaves the attention as it is. A model may add its own: anything else
# that is not None is refused, because an option that is ignored in silence changes the model.
HARMLESS = {
    "cache_position", "deterministic", "encoder_hidden_states", "kernel_options", "layer_idx", "mm_token_type_ids",
    "num_items_in_batch", "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "seq_idx", "token_type_ids", "use_cache",
}  # fmt: skip

REFUSED = {
    "cache": "paged attention (continuous batching) needs another implementation, such as 'sdpa'",
    "head_mask": "entmax has no mask of whole heads: prune the heads instead",
    "output_attentions": "the probabilities are never stored: flash_entmax.inspection computes what one wants to see",
    "position_bias": "biases added to the scores are not supported: use attn_implementation='eager'",
    "s_aux": "attention sinks are a term of softmax's denominator, which entmax does not have",
}


def register(*models: nn.Module) -> None:
    """Make ``attn_implementation="entmax15"``, ``"sparsemax"`` and ``"entmax"`` known to Transformers.

    Calling it again changes nothing. From then on, the ``config.json`` of a model says which of them it has
    (``"attn_implementation": null`` where it has none).

    Args:
        models: that were built before, and are to have one of these by ``model.set_attn_implementation``.

    Raises:
        ImportError: Transformers 5.4 or later is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
    except ImportError as error:
        raise ImportError(INSTALL.format("it is missing or older")) from error
    if tuple(int(part) for part in __version__.split(".")[:2]) < OLDEST:
        raise ImportError(INSTALL.format(f"got {__version__}"))
    for name, alpha in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, partial(attention, alpha=alpha))
        AttentionMaskInterface.register(name, mask)
    watch_construction()
    for model in models:
        prepare_built(model)


OLDEST = 5, 4  # older ones describe masks differently, and load what was saved as softmax
INSTALL = 'this integration needs transformers 5.4 or later, {}: pip install "flash-entmax[transformers]"'


def __getattr__(name: str) -> Any:
    """`AnnealAlpha` derives from a class of Transformers, which may not be installed: imported at its first use."""
    if name != "AnnealAlpha":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .annealing import AnnealAlpha

    globals()[name] = AnnealAlpha
    return AnnealAlpha


# The attention function


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

    The mask decides, as it does for ``"eager"``; ``is_causal`` and ``sliding_window`` count only where a model makes no
    mask. ``cu_seq_lens_q`` and ``cu_seq_lens_k`` pack the tokens of all rows, as for FlashAttention.

    Args:
        query, key, value: (batch, heads or key heads, length, dim).

    Returns:
        (batch, query length, heads, dim), and None for the probabilities, which are not stored.

    Raises:
        ValueError: an option that entmax does not have, or that is not known; see HARMLESS.
        RuntimeError: the model was built before :func:`register`.
    """
    note_caller(module)
    if implementation_of(module) in IMPLEMENTATIONS and is_undeclared(module.config):
        raise RuntimeError(
            f"{type(module).__name__} belongs to a model that was built before register(), and would not be saved with "
            "this attention: call register(model), from flash_entmax.integrations.transformers"
        )
    wanted = getattr(getattr(module, "config", None), "output_attentions", False)
    _check_options(dropout, {"output_attentions": wanted} | options)
    if isinstance(attention_mask, Mask):
        sight = attention_mask
        if is_causal is False and sight.window[1] == 0 and getattr(module, "is_causal", False):
            raise ValueError("is_causal=False was passed to a model with a causal mask: set config.is_causal = False")
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        sight = sight_of(attention_mask, query, key, causal, sliding_window)
    if sight.key_length != key.shape[2] or (sight.is_local and sight.query_length != query.shape[2]):
        lengths = f"{sight.query_length} queries and {sight.key_length} keys"
        raise ValueError(f"the mask is for {lengths}, but the layer has {query.shape[2]} and {key.shape[2]}")
    alpha = alpha_of(module, query.device) if alpha is None else alpha
    numbers = {"alpha": alpha, "scale": scaling, "softcap": softcap or 0.0}
    if cu_seq_lens_q is not None:
        if any(part is not None for part in (sight.positions, sight.key_mask, sight.block_mask)):
            raise ValueError("cu_seq_lens_q packs sequences without padding, cache or 4-D mask: pass it without them")
        longest = (n if isinstance(n, int) else query.shape[0] * key.shape[2] for n in (max_length_q, max_length_k))
        return _attend_packed(query, key, value, sight, numbers, cu_seq_lens_q, cu_seq_lens_k, *longest), None
    if sight.boundaries is not None:
        longest = key.shape[2]
        return _attend_packed(query, key, value, sight, numbers, sight.boundaries, None, longest, longest), None
    output = entmax_attention(
        query, key, value, window_size=sight.window, query_positions=sight.positions, key_mask=sight.key_mask,
        block_mask=sight.block_mask, **numbers,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _attend_packed(query, key, value, sight: Mask, numbers: dict[str, Any], *packing) -> Tensor:
    """The tokens of all rows one after another; `packing` is (boundaries of queries, of keys, longest of each)."""
    tokens = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output = entmax_attention_varlen(*tokens, *packing, window_size=sight.window, **numbers)
    return output.unflatten(0, (query.shape[0], query.shape[2]))


def _check_options(dropout: float, options: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"attention dropout is not supported, got {dropout}: set it to 0 in the config (attention_dropout, "
            "attention_probs_dropout_prob or attn_pdrop, by model)"
        )
    for name, value in options.items():
        if name in HARMLESS or value is None or value is False:
            continue
        if name in REFUSED:
            raise ValueError(f"{name} was passed, got {type(value).__name__}: {REFUSED[name]}")
        raise ValueError(
            f"{name} is not known to this attention, got {type(value).__name__}: if it leaves the attention as it is, "
            f"say so by flash_entmax.integrations.transformers.HARMLESS.add({name!r})"
        )
