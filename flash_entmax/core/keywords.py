"""Keywords of other attention calls, and what says the same here."""

from collections.abc import Mapping
from typing import NoReturn

LEFT_OUT = "leave it out"
SAID_BY: dict[str, str] = {
    "attn_mask": "padding is key_mask or key_lengths, beside is_causal if that is in it, a window is window_size, any "
    "other boolean mask is a block_mask by create_block_mask, and ALiBi is alibi_slopes",
    "dropout_p": f"there is no dropout of probabilities, {LEFT_OUT}",
    "enable_gqa": f"the numbers of heads say it, {LEFT_OUT}",
    "causal": "it is is_causal",
    "softmax_scale": "it is scale",
    "cache_seqlens": "it is key_lengths",
    "score_mod": "of score modifications there are softcap and alibi_slopes",
    "varlen": "it is key_lengths",
    "niter": f"every row is solved until it is right, {LEFT_OUT}",
    "n_iter": f"every row is solved until it is right, {LEFT_OUT}",
}


def refuse_keywords(function: str, given: Mapping[str, object], own: Mapping[str, str] | None = None) -> NoReturn:
    """A TypeError as Python has it, with what to say instead where another library, or another call, knows the keyword:
    that is in SAID_BY, or in `own`."""
    said_by = {**SAID_BY, **(own or {})}
    parts = [f"{name!r} ({said_by[name]})" if name in said_by else repr(name) for name in given]
    words = "an unexpected keyword argument" if len(parts) == 1 else "unexpected keyword arguments"
    raise TypeError(f"{function}() got {words} {', '.join(parts)}")
