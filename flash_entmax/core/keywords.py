"""Arguments of other attention calls: those that change nothing here, and what says the same as the others."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches

LEFT_OUT = "leave it out"
MASKS = (
    "padding is key_mask or key_lengths, beside is_causal if that is in it, a window is window_size, any other boolean "
    "mask is a block_mask by create_block_mask, and ALiBi is alibi_slopes"
)
NO_DROPOUT = f"there is no dropout of probabilities, {LEFT_OUT}"
SOLVED = f"every row is solved until it is right, {LEFT_OUT}"
SINKS = "attention sinks are a term of softmax's denominator, which entmax does not have"
SAID_BY: dict[str, str] = {
    "attn_mask": MASKS,
    "mask": MASKS,
    "key_padding_mask": "it is key_mask, which is True where a key may be seen",
    "dropout_p": NO_DROPOUT,
    "dropout": NO_DROPOUT,
    "enable_gqa": f"the numbers of heads say it, {LEFT_OUT}",
    "causal": "it is is_causal",
    "softmax_scale": "it is scale",
    "cache_seqlens": "it is key_lengths",
    "score_mod": "of score modifications there are softcap and alibi_slopes",
    "return_attn_probs": "there is return_support",
    "deterministic": f"every repeat gives the same bits, {LEFT_OUT}",
    "varlen": "it is key_lengths",
    "niter": SOLVED,
    "n_iter": SOLVED,
    "s_aux": SINKS,
    "sinks": SINKS,
}
# Options of scaled_dot_product_attention, with the values that ask for what is so anyway.
CHANGES_NOTHING: dict[str, object] = {"attn_mask": None, "dropout_p": 0.0, "enable_gqa": True}


def check_keywords(
    function: Callable[..., object], given: Mapping[str, object], own: Mapping[str, str] | None = None
) -> None:
    """Take what changes nothing. Of the rest raise a TypeError as Python has it, with what to say instead.

    Where another library, or another call, knows the keyword, that is in SAID_BY, or in `own`.
    """
    refused = [name for name, value in given.items() if not changes_nothing(name, value)]
    if not refused:
        return
    said_by = {**SAID_BY, **(own or {})}
    names = list(inspect.signature(function).parameters)
    parts = [f"{name!r}{advice(name, said_by, names)}" for name in refused]
    words = "an unexpected keyword argument" if len(parts) == 1 else "unexpected keyword arguments"
    raise TypeError(f"{function.__qualname__}() got {words} {', '.join(parts)}")


def refuse_positions(
    function: Callable[..., object], own: tuple[str, ...], given: tuple[object, ...], instead: str
) -> None:
    """Raise a TypeError for what is given by position behind the function's ``own`` arguments, if anything is."""
    if given:
        raise TypeError(
            f"{function.__qualname__}() takes {', '.join(own)} by position, and got {len(own) + len(given)} arguments: "
            f"{instead}"
        )


def changes_nothing(name: str, value: object) -> bool:
    if name not in CHANGES_NOTHING:
        return False
    harmless = CHANGES_NOTHING[name]
    return value is harmless or (isinstance(value, (int, float)) and value == harmless)


def advice(name: str, said_by: Mapping[str, str], names: list[str]) -> str:
    if name in said_by:
        return f" ({said_by[name]})"
    alike = get_close_matches(name, names, 1)
    return f" (did you mean {alike[0]}?)" if alike else ""
