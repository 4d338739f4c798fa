"""What the queries of a Transformers model see, as options of `entmax_attention`.

Transformers describes a mask by a function of indices, from which causal, bidirectional, windowed and packed attention
are read. What cannot be read (chunks, image blocks, functions of one's own) is evaluated densely into a FlexAttention
``BlockMask``, like 4-D masks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.visibility import UNLIMITED
from .mask_functions import read


class Mask(NamedTuple):
    """What the queries of one forward pass see, for all layers that share it; models pass it on as they got it.

    window: (left, right) as of :func:`entmax_attention`. positions: of the queries, counted from the first key; None
    where the last query stands at the last key. key_mask: (batch, key length). boundaries: (tokens + 1,), of sequences
    packed in any row; the last ones are empty. block_mask: instead of all others.
    """

    query_length: int
    key_length: int
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    positions: int | Tensor | None = None
    key_mask: Tensor | None = None
    boundaries: Tensor | None = None
    block_mask: Any = None

    # Transformers takes a mask of four dimensions for one that is ready. `generate` makes masks before the model does.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, 1, self.query_length, self.key_length

    def contiguous(self) -> "Mask":
        return self

    @property
    def is_local(self) -> bool:
        """What a query sees depends on where it stands."""
        return self.window != (UNLIMITED, UNLIMITED) or self.boundaries is not None

    # A model that computes with its mask expects a tensor.

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(COMPUTES.format(f"reads its {name}"))

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        raise TypeError(COMPUTES.format(f"calls {getattr(function, '__name__', function)} on it"))

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, tuple):
            return tuple.__eq__(self, other)
        raise TypeError(COMPUTES.format("compares it"))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


COMPUTES = (
    "this model computes with its attention mask (it {}), which is no tensor with entmax attention, but a description "
    "of what a query sees: load the model with attn_implementation='eager' or 'sdpa'"
)


def _refuse(does: str) -> Callable:
    def refuse(self, *operands):
        raise TypeError(COMPUTES.format(does))

    return refuse


for _name in ("getitem", "setitem"):
    setattr(Mask, f"__{_name}__", _refuse("indexes it"))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor"):
    setattr(Mask, f"__{_name}__", _refuse("calculates with it"))
    setattr(Mask, f"__r{_name}__", _refuse("calculates with it"))
for _name in ("invert", "neg", "lt", "le", "gt", "ge"):
    setattr(Mask, f"__{_name}__", _refuse("calculates with it"))


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **options,
) -> Mask:
    """What Transformers calls once for each kind of mask: its function of indices and the padding, as a `Mask`.

    Query i has index q_offset + i, key j has kv_offset + j. attention_mask: (batch, keys) bool, by the key's index.
    use_vmap: the function has parts that a user or a model wrote.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    seen = None if use_vmap else read(mask_function)
    packed = seen is not None and seen.sequences is not None
    if packed and not (attention_mask is None and _are_rows(seen.sequences, q_length, kv_length, q_offset, kv_offset)):
        seen = None
    if seen is None:
        return _densely(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            q_offset=q_offset, kv_offset=kv_offset, attention_mask=attention_mask, use_vmap=use_vmap, **options,
        )  # fmt: skip
    key_mask = None
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[-1])  # keys that a static cache has room for
        key_mask = nn.functional.pad(attention_mask.to(torch.bool), (0, missing))[:, kv_offset : kv_offset + kv_length]
        if not torch.compiler.is_compiling() and key_mask.all():
            key_mask = None
    boundaries = _boundaries(seen.sequences) if packed else None
    window = (seen.left, seen.right)
    positions = None if window == (UNLIMITED, UNLIMITED) else q_offset - kv_offset
    if isinstance(positions, Tensor):  # a static cache counts on the device
        positions = positions + torch.arange(q_length, device=positions.device)
    elif positions == kv_length - q_length:
        positions = None
    return Mask(q_length, kv_length, window, positions, key_mask, boundaries)


def _are_rows(sequences: Tensor, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """The tokens of each sequence lie side by side, and queries and keys are the same tokens."""
    if isinstance(q_offset, Tensor) or (q_offset, kv_offset) != (0, 0) or q_length != kv_length:
        return False
    # Transformers counts sequences upwards; in torch.compile, where nothing can be read, there are no others.
    return torch.compiler.is_compiling() or not (sequences.diff() < 0).any()


def _boundaries(sequences: Tensor) -> Tensor:
    """(tokens + 1,) int32, sorted: where a sequence begins, then as often as needed the number of tokens.

    Their number does not depend on the data, so that nothing waits for the device.
    """
    first = torch.ones_like(sequences[:, :1], dtype=torch.bool)
    begins = torch.cat([first, sequences[:, 1:] != sequences[:, :-1]], 1).flatten()
    tokens = begins.numel()
    places = torch.arange(tokens, dtype=torch.int32, device=begins.device)
    places = torch.where(begins, places, tokens).sort().values
    return torch.cat([places, torch.full_like(places[:1], tokens)])


def _densely(**options) -> Mask:
    from transformers.masking_utils import sdpa_mask

    _check_eager("a mask function of its own")
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = sdpa_mask(**options)
    return Mask(options["q_length"], options["kv_length"], block_mask=_as_block_mask(dense))


def _check_eager(what: str) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{what} is evaluated into a BlockMask, which cannot be done inside torch.compile: run the model without "
            "it, or with causal, bidirectional, windowed or packed attention and a 2-D attention_mask"
        )


def _as_block_mask(dense: Tensor):
    """A FlexAttention BlockMask from (batch or 1, heads or 1, queries, keys) bool."""
    from torch.nn.attention.flex_attention import create_block_mask

    def look_up(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # As dense[batch, head, query, key], which vmap refuses for scalars.
        return torch.ops.aten.index.Tensor(dense, (batch, head, query, key))

    return create_block_mask(look_up, *dense.shape, device=dense.device)


def _given(dense: Tensor, query: Tensor, key: Tensor) -> Mask:
    """A `Mask` from one that the model's caller, or the model, made: 4-D, bool, or 0 and minus infinity."""
    (batch, heads, query_length, _), key_length = query.shape, key.shape[2]
    full = (batch, heads, query_length, key_length)
    fits = dense.dim() == 4 and dense.shape[-1] == key_length
    if not fits or any(size not in (1, most) for size, most in zip(dense.shape, full, strict=True)):
        raise ValueError(
            f"a mask that is passed to a layer must have shape (batch, heads, queries, keys), each of the first three "
            f"extents 1 or that of {full}, got {tuple(dense.shape)}"
        )
    if dense.dtype == torch.bool and dense.shape[1] == dense.shape[2] == 1:
        return Mask(query_length, key_length, key_mask=dense[:, 0, 0].expand(batch, key_length))
    _check_eager("a 4-D attention_mask")
    visible = _visible(dense).expand(-1, -1, query_length, -1)
    kept, block_mask = _block_masks.get(dense, (None, None))
    if kept is None or not torch.equal(kept, visible):
        block_mask = _as_block_mask(visible)
        _block_masks[dense] = visible, block_mask
    return Mask(query_length, key_length, block_mask=block_mask)


# All layers get the same tensor. What was made of it is compared, as not every write to a tensor is counted by it.
_block_masks = WeakTensorKeyDictionary()


def _visible(dense: Tensor) -> Tensor:
    """A boolean copy, so that what is kept for a tensor does not keep the tensor."""
    if dense.dtype == torch.bool:
        return dense.clone()
    hidden = dense <= -1e4  # what models take for minus infinity
    if not (hidden | (dense == 0)).all():
        raise ValueError(
            "attention_mask holds numbers other than 0 and minus infinity: biases added to the scores are not "
            "supported; use attn_implementation='eager', or a boolean mask"
        )
    return ~hidden


def sight_of(given: object, query: Tensor, key: Tensor, is_causal: bool, sliding_window: int | None) -> Mask:
    """The mask of a model that did not make it by Transformers' mask functions."""
    lengths = query.shape[2], key.shape[2]
    if isinstance(given, Tensor):
        return _given(given, query, key)
    if given is not None:
        return Mask(*lengths, block_mask=given)
    is_causal = is_causal and lengths[0] > 1
    if is_causal and lengths[0] != lengths[1]:
        raise ValueError(f"a causal mask for {lengths[0]} queries and {lengths[1]} keys needs an attention_mask")
    left = UNLIMITED if sliding_window is None else sliding_window - 1
    return Mask(*lengths, (left, 0 if is_causal else left))
