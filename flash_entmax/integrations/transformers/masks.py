"""Masks of Transformers models, as options of `entmax_attention`.

Transformers describes a mask by a function of indices. Causal, bidirectional, windowed and packed attention are read
from the function. Any other function (chunks, image blocks, functions of a user) is evaluated densely into a
FlexAttention ``BlockMask``, and so are 4-D masks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.checks import typed
from ...core.intervals import UNLIMITED, intervals_of_rows
from .mask_functions import MaskTerms, read_mask
from .shared_batch import SharedBatch, shared_batch


class Mask(NamedTuple):
    """Which keys the queries of one forward pass see. Models pass it to their layers, which share it.

    Attributes:
        query_length, key_length: for which it was made.
        window: (left, right), as for :func:`entmax_attention`.
        positions: of the queries, counted from the first key; None where the last query stands at the last key.
        key_mask: (batch, key length) bool, True where a key may be seen; None also where the intervals say so.
        boundaries: (tokens + 1,) int32, of the sequences that are packed in all rows; the last ones are empty.
        block_mask: a FlexAttention ``BlockMask``, in place of all the others.
        intervals: (batch, 3, query length) int32, what window, positions and padding come to: the first key that a
            query sees, one past the last, its position. All layers share them. None where no query needs one.
        hides_padding: the intervals hide padding.
        parallel: the ``ContextParallel`` of `context_parallel`. Then the lengths and the key_mask are those of this
            rank's part, and the boundaries those of the whole sequence.
    """

    query_length: int
    key_length: int
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    positions: int | Tensor | None = None
    key_mask: Tensor | None = None
    boundaries: Tensor | None = None
    block_mask: Any = None
    intervals: Tensor | None = None
    hides_padding: bool = False
    parallel: Any = None

    # Transformers takes a mask of four dimensions as ready. `generate` makes masks before the model does.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, 1, self.query_length, self.key_length

    def contiguous(self) -> "Mask":
        return self

    @property
    def is_local(self) -> bool:
        """Which keys a query sees depends on its position."""
        return self.window != (UNLIMITED, UNLIMITED) or self.boundaries is not None or self.intervals is not None

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
    """What Transformers calls once for each kind of mask: makes a `Mask` of its function of indices and the padding.

    Args:
        mask_function: of the indices of batch row, head, query and key. Query i has the index q_offset + i, and key j
            has kv_offset + j.
        attention_mask: (batch, keys) bool by the key's index, the padding; or a `Mask`, which is returned.
        use_vmap: the function has parts that a user or a model wrote.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    terms = None if use_vmap else read_mask(mask_function)
    shared = shared_batch()
    if shared is not None:
        return _mask_of_part(shared, q_length, kv_length, terms, attention_mask)
    is_packed = terms is not None and terms.sequences is not None
    if is_packed and (
        attention_mask is not None or not _are_packed_rows(terms.sequences, q_length, kv_length, q_offset, kv_offset)
    ):
        terms = None
    if terms is None:
        return _dense_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            q_offset=q_offset, kv_offset=kv_offset, attention_mask=attention_mask, use_vmap=use_vmap, **options,
        )  # fmt: skip
    key_mask, padding = None, None
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[-1])  # keys that a static cache has room for
        key_mask = nn.functional.pad(attention_mask.to(torch.bool), (0, missing))[:, kv_offset : kv_offset + kv_length]
        if _can_be_read(key_mask):
            key_mask, padding = _read_padding(key_mask, is_causal=terms.right != UNLIMITED)
    boundaries = _boundaries(terms.sequences) if is_packed else None
    positions = q_offset - kv_offset
    window = _narrowest_window(terms, positions, q_length)
    if window == (UNLIMITED, UNLIMITED):
        positions = None
    elif isinstance(positions, Tensor):  # a static cache counts on the device
        positions = positions + torch.arange(q_length, device=positions.device)
    elif positions == kv_length - q_length:
        positions = None
    intervals, device = None, options.get("device", None if attention_mask is None else attention_mask.device)
    is_plain = padding is None and positions is None and window[0] == UNLIMITED and window[1] in (UNLIMITED, 0)
    if not (is_packed or is_plain or device is None):
        intervals = _intervals(window, positions, padding, (batch_size, q_length, kv_length), device)
    return Mask(
        q_length, kv_length, window, positions, key_mask, boundaries, intervals=intervals,
        hides_padding=padding is not None,
    )  # fmt: skip


def _mask_of_part(
    shared: SharedBatch, q_length: int, kv_length: int, terms: MaskTerms | None, attention_mask: Tensor | None
) -> Mask:
    """For this rank's part of a batch. Where its positions jump, no sequence begins: the whole batch says where."""
    if (q_length, kv_length) != (shared.local_length,) * 2:
        raise ValueError(
            f"context_parallel has shared sequences of which each rank has {shared.local_length} tokens, but the model "
            f"was called with {q_length} queries and {kv_length} keys: call it with what the block yields"
        )
    if terms is None:
        raise ValueError(
            "context_parallel takes causal, bidirectional and windowed attention, got a mask function of another kind"
        )
    if shared.boundaries is not None and shared.jumps and terms.sequences is None:
        raise ValueError(
            "position_ids that start anew pack sequences under context_parallel, but this model makes its masks "
            "without position_ids, and does not pack: leave position_ids out, or let them rise by one"
        )
    key_mask = None if attention_mask is None else attention_mask.to(torch.bool)
    window = terms.left, terms.right
    return Mask(q_length, kv_length, window, None, key_mask, shared.boundaries, parallel=shared.parallel)


def _can_be_read(tensor: Tensor) -> bool:
    """Whether Python may look at what the tensor holds."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _read_padding(key_mask: Tensor, is_causal: bool) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """(key_mask, padding), at least one of them None. Padding is the first key of each row and one past its last one,
    (batch,) each, where a row's keys stand side by side.

    One wait for the device tells which of them it is. Masks that are not causal keep their key_mask.
    """
    changes = nn.functional.pad(key_mask.to(torch.int8), (1, 1)).diff()
    is_whole, is_run = torch.stack((key_mask.all(), ((changes > 0).sum(1) <= 1).all())).tolist()
    if is_whole:
        return None, None
    if not (is_causal and is_run):
        return key_mask, None
    return None, (changes.argmax(1), changes.argmin(1))


def _narrowest_window(terms: MaskTerms, first: int | Tensor, q_length: int) -> tuple[int, int]:
    """(left, right). A left side that reaches past the first key from every query is no limit.

    first: the position of the first query. Inside torch.compile this would be compiled for each side of the limit.
    """
    if isinstance(first, Tensor) or torch.compiler.is_compiling() or first + q_length - 1 > terms.left:
        return terms.left, terms.right
    return UNLIMITED, terms.right


def _intervals(
    window: tuple[int, int],
    positions: int | Tensor | None,
    padding: tuple[Tensor, Tensor] | None,
    sizes: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """(batch, 3, query length) int32. `sizes` are (batch, query length, key length)."""
    first, last = (None, None) if padding is None else padding
    given, begin = (positions, 0) if isinstance(positions, Tensor) else (None, positions)
    begin = sizes[2] - sizes[1] if begin is None else begin
    intervals = intervals_of_rows(given, last, None, None, sizes, begin, window, device)
    if first is not None:
        intervals[:, 0].clamp_min_(first.unsqueeze(1))
    return intervals


def _are_packed_rows(sequences: Tensor, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """Queries and keys are the same tokens, and the tokens of each sequence lie side by side."""
    if isinstance(q_offset, Tensor) or (q_offset, kv_offset) != (0, 0) or q_length != kv_length:
        return False
    # Transformers counts sequences upwards; in torch.compile, where nothing can be read, there are no others.
    return torch.compiler.is_compiling() or not (sequences.diff() < 0).any()


def _boundaries(sequences: Tensor) -> Tensor:
    """(tokens + 1,) int32, ascending: where each sequence begins, then the number of tokens, repeated to the end.

    The length does not depend on the data, so that nothing waits for the device.
    """
    first = torch.ones_like(sequences[:, :1], dtype=torch.bool)
    begins = torch.cat([first, sequences[:, 1:] != sequences[:, :-1]], 1).flatten()
    tokens = begins.numel()
    places = torch.arange(tokens, dtype=torch.int32, device=begins.device)
    places = torch.where(begins, places, tokens).sort().values
    return torch.cat([places, torch.full_like(places[:1], tokens)])


def _dense_mask(**options) -> Mask:
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


def _mask_of_tensor(dense: Tensor, query: Tensor, key: Tensor) -> Mask:
    """From a 4-D tensor that the model or its caller made: bool, or 0 and minus infinity."""
    (batch, heads, query_length, _), key_length = query.shape, key.shape[2]
    full = (batch, heads, query_length, key_length)
    fits = dense.dim() == 4 and dense.shape[-1] == key_length
    if not fits or any(size not in (1, whole) for size, whole in zip(dense.shape, full, strict=True)):
        raise ValueError(
            f"a mask that is passed to a layer must have shape (batch, heads, queries, keys) = {full}, in which "
            f"each of the first three may be 1, got {tuple(dense.shape)}"
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


# All layers get the same tensor. Its copy is compared with it, because not every write raises a tensor's version.
_block_masks = WeakTensorKeyDictionary()


def _visible(dense: Tensor) -> Tensor:
    """True where a key may be seen. A copy: a view in `_block_masks` would keep the tensor alive."""
    if dense.dtype == torch.bool:
        return dense.clone()
    hidden = dense <= -1e4  # what models take for minus infinity
    if not (hidden | (dense == 0)).all():
        raise ValueError(
            "attention_mask holds numbers other than 0 and minus infinity: biases added to the scores are not "
            "supported; use attn_implementation='eager', or a boolean mask"
        )
    return ~hidden


def mask_of(
    module: nn.Module, given: object, query: Tensor, key: Tensor, is_causal: bool | None, sliding_window: int | None
) -> Mask:
    """The mask of one layer's call, whatever the model passes to it: a `Mask`, a tensor, a ``BlockMask`` or None."""
    query_length, key_length = query.shape[2], key.shape[2]
    if isinstance(given, Mask):
        if is_causal is False and given.window[1] == 0 and getattr(module, "is_causal", False):
            raise ValueError("is_causal=False was passed to a model with a causal mask: set config.is_causal = False")
        if given.key_length != key_length or (given.is_local and given.query_length != query_length):
            lengths = f"{given.query_length} queries and {given.key_length} keys"
            raise ValueError(f"the mask is for {lengths}, but the layer has {query_length} and {key_length}")
        if given.intervals is not None and given.intervals.shape[0] != query.shape[0]:
            rows = given.intervals.shape[0]
            raise ValueError(f"the mask is for a batch of {rows}, but the layer has one of {query.shape[0]}")
        return given
    if shared_batch() is not None:
        raise ValueError(
            f"context_parallel needs a layer to which its model passes the mask of the part, got {typed(given)} in "
            f"{type(module).__name__}"
        )
    if isinstance(given, Tensor):
        return _mask_of_tensor(given, query, key)
    if given is not None:
        return Mask(query_length, key_length, block_mask=given)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = is_causal and query_length > 1
    if is_causal and query_length != key_length:
        raise ValueError(f"a causal mask for {query_length} queries and {key_length} keys needs an attention_mask")
    left = UNLIMITED if sliding_window is None else sliding_window - 1
    return Mask(query_length, key_length, (left, 0 if is_causal else left))
