"""The public calls of attention: check, lower, call."""

from typing import TYPE_CHECKING, Literal, NoReturn, overload

import torch
from torch import Tensor

from .backends import Impl, choose
from .core.alphas import within_range
from .core.call import KeySummary, ScoreOptions, Support
from .core.checks import check_keys, require_dense
from .core.intervals import UNLIMITED
from .core.keywords import MASKS, check_keywords, refuse_positions
from .core.modes import as_autocast
from .core.tensors import is_jagged, is_nested, jagged_like, longest_sequence
from .core.visibility import Visibility
from .key_summaries import KeySummaries
from .operators.attention import summarise
from .operators.kept_calls import attend

if TYPE_CHECKING:
    from torch.nested._internal.nested_tensor import NestedTensor
    from torch.nn.attention.flex_attention import BlockMask

# Keywords of attention over packed sequences elsewhere, and their names here.
OF_VARLEN = {
    "cu_seqlens": "it is cu_seq_q, and None for cu_seq_k", "cu_seqlens_q": "it is cu_seq_q",
    "cu_seqlens_k": "it is cu_seq_k", "max_seqlen": "it is max_q and max_k", "max_seqlen_q": "it is max_q",
    "max_seqlen_k": "it is max_k",
}  # fmt: skip
NAMED = f"options have names, as is_causal=True; of attn_mask, {MASKS}"
PACKED = dict.fromkeys((*OF_VARLEN, "cu_seq_q", "cu_seq_k", "max_q", "max_k"), "for entmax_attention_varlen")


@overload
def entmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, alpha: float | Tensor = ...,
    alpha_range: tuple[float, float] | None = ..., is_causal: bool = ...,
    scale: float | Tensor | None = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ..., query_positions: int | Tensor | None = ..., key_lengths: Tensor | None = ...,
    key_mask: Tensor | None = ..., block_mask: "BlockMask | None" = ...,
    key_summary: KeySummary | KeySummaries | None = ..., impl: Impl = ..., return_support: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def entmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, alpha: float | Tensor = ...,
    alpha_range: tuple[float, float] | None = ..., is_causal: bool = ...,
    scale: float | Tensor | None = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ..., query_positions: int | Tensor | None = ..., key_lengths: Tensor | None = ...,
    key_mask: Tensor | None = ..., block_mask: "BlockMask | None" = ...,
    key_summary: KeySummary | KeySummaries | None = ..., impl: Impl = ..., return_support: Literal[True],
) -> tuple[Tensor, Support]: ...  # fmt: skip


@overload
def entmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, alpha: float | Tensor = ...,
    alpha_range: tuple[float, float] | None = ..., is_causal: bool = ...,
    scale: float | Tensor | None = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ..., query_positions: int | Tensor | None = ..., key_lengths: Tensor | None = ...,
    key_mask: Tensor | None = ..., block_mask: "BlockMask | None" = ...,
    key_summary: KeySummary | KeySummaries | None = ..., impl: Impl = ..., return_support: bool,
) -> Tensor | tuple[Tensor, Support]: ...  # fmt: skip


def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *by_position: NoReturn,
    alpha: float | Tensor = 1.5,
    alpha_range: tuple[float, float] | None = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    query_positions: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    block_mask: "BlockMask | None" = None,
    key_summary: KeySummary | KeySummaries | None = None,
    impl: Impl = "auto",
    return_support: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Support]:
    """Attention whose weights are alpha-entmax instead of softmax: most keys get a probability of exactly zero.

    For each query, over the keys j that it may see::

        s_j = cap(scale * query . key_j) - slope * |position - j|       cap(x) = softcap * tanh(x / softcap)
        p_j = [(alpha - 1) s_j - tau]_+ ^ (1 / (alpha - 1)),   sum_j p_j = 1,   output = sum_j p_j value_j

    Tiles of keys that provably get probability zero are skipped, in the forward pass and in the gradient; the result
    is exact. Peters et al. (2019, arXiv 1905.05702) define alpha-entmax, AdaSplash-2 (arXiv 2604.15180) the algorithm
    that this one builds on.

    A key must pass every mask that is given: ``is_causal``, ``window_size``, ``key_lengths``, ``key_mask`` or
    ``block_mask``. Keys stand at positions 0, 1, ...; query i stands at i + (key length - query length), so that the
    last query stands at the last key, unless ``query_positions`` says otherwise.

    Args:
        query: (batch, heads, query length, head size); float16, bfloat16, float32 or float64, any strides. The kernels
            read views in place if their rows are contiguous and start at multiples of 16 elements, as (batch, length,
            heads, dim) views of common head sizes do; they copy other tensors first. A jagged nested tensor (batch,
            heads, ragged length, head size) is taken too, if key and value are as well: its sequences are packed.
        key: (batch, key heads, key length, head size). ``heads`` must be a multiple of ``key heads``; consecutive query
            heads share a key head (grouped-query attention).
        value: (batch, key heads, key length, value size). Head sizes are from 1 to 512.
        alpha: 1, or from 1.0001 to 2. Larger is sparser; 2 is sparsemax, and exactly 1 is softmax, computed by
            ``scaled_dot_product_attention``, with any mask but the plain causal one as a dense tensor. A tensor, scalar
            or (heads,), gets its exact gradient, and no value of it compiles anything; it must be in [1.01, 2]. In
            float32 the relative rounding of a probability is about 2^-24 / (alpha - 1), so alpha below 1.01 loses
            digits, and below 1.0001 is refused.
        alpha_range: (lowest, highest), to which alpha is clamped, with gradient 0 outside: for an alpha that training
            may move too far. None clamps nothing.
        is_causal: a query sees the keys up to its own position. PyTorch's ``is_causal`` aligns to the upper left; at
            equal lengths the two agree.
        scale: positive; default ``1 / sqrt(head size)``. A tensor, scalar or (heads,), gets its gradient; it is clamped
            to [1e-6, 1e6], with gradient 0 outside. Beside a tensor alpha a number is clamped as well. Beside a tensor
            scale, alpha must be 1 or in [1.01, 2].
        window_size: (left, right): a query sees the keys from position - left to position + right; -1 is no limit.
            Tiles outside are never visited. With ``is_causal``, right counts as 0.
        softcap: bounds scores to (-softcap, softcap), before any bias; 0 is none. At most 1,000 in 16-bit types.
            Not with alpha=1.
        alibi_slopes: (heads,) or (batch, heads), any floating dtype, with gradient: what each step of distance takes
            from the score (Press et al. 2022, arXiv 2108.12409). An infinite slope leaves only the own position; a
            finite one times any distance must fit float32, and takes its digits from the scores: a row whose nearest
            visible key is far away has an error of about 2^-24 * slope * that distance.
        query_positions: the position of the first query, or that of each one, (query length,) or (batch, query length)
            int32 or int64, in any order: for shards and chunks of the queries.
        key_lengths: (batch,) int32 or int64: of each batch row, only so many keys exist (padding on the right). Where
            queries are not as many as keys, masks by position and slopes then need ``query_positions``.
        key_mask: (batch, key length) bool, True where the key may be seen (padding on the left, or anywhere).
        block_mask: a FlexAttention ``BlockMask`` for these lengths: of its partial blocks the ``mask_mod`` decides,
            evaluated by PyTorch. What comes of it is kept until another one is set, or a tensor, number or function
            that it reads is another or is written to; if it reads anything else (an object's attributes, inference
            tensors), it is evaluated by each call. Not inside ``torch.compile``.
        key_summary: what :func:`flash_entmax.summarise_keys` returned for these keys. Calls that share their keys then
            read all of them once less. Or, for decoding, the :class:`flash_entmax.KeySummaries` that these keys were
            appended to: a call then reads half of the bytes of the keys, for at most 16 queries and without gradients.
            A summary of other keys gives wrong results. Plain PyTorch, the specification and softmax have no use for
            either, nor have calls of at most 16 queries without gradients for the first. The result is the same.
        impl: ``"triton"`` (CUDA; CPU tensors under Triton's interpreter), ``"torch"`` (the same stages in PyTorch, any
            device, any dtype), ``"reference"`` (dense, autograd) or ``"auto"``: Triton on CUDA where it can run, else
            torch. An explicit choice never falls back.
        return_support: also return a :class:`Support`: the threshold and support size of each row, the live tiles. Not
            with alpha=1.

    Returns:
        The output, (batch, heads, query length, value size) in the dtype of the inputs (of autocast, where that is on,
        as for ``scaled_dot_product_attention``), stored in the order of the query's dimensions, as gradients are; with
        ``return_support`` a pair of it and the ``Support``, which carries no gradient. Of nested inputs the output is
        nested, and the ``Support`` is of all tokens, without a batch. A query that sees no key gets output 0 and
        gradient 0. A NaN or inf among a row's scores, scores that are all -inf, or a NaN or inf in a value that it
        attends to, make it NaN. Values must be finite also where no query sees them, as in padding: 0 times NaN is NaN,
        so that a NaN there may make other rows NaN, and a hidden NaN in a key makes gradients NaN. A NaN in a tensor
        alpha, scale or slope makes its head NaN.

    Raises:
        TypeError: an input that is not a floating-point tensor, mixed dtypes, or an option of the wrong type.
        ValueError: shapes, devices or options that do not fit or exclude each other; ``KeySummaries`` where gradients,
            ``return_support`` or more than 16 queries are asked for. A tensor alpha out of range on CUDA, where reading
            it would wait for the device, is a device-side assertion.
    """
    if by_position or unknown:
        refuse_positions(entmax_attention, ("query", "key", "value"), by_position, NAMED)
        check_keywords(entmax_attention, unknown, PACKED)
    alpha = alpha if alpha_range is None else within_range(alpha, alpha_range)
    score = ScoreOptions(alpha, scale, softcap, alibi_slopes)
    if is_nested(query) or is_nested(key) or is_nested(value):
        if any(option is not None for option in (query_positions, key_lengths, key_mask, block_mask, key_summary)):
            refused = "query_positions, key_lengths, key_mask, block_mask and key_summary"
            raise ValueError(f"{refused} are for tensors of one length, not for nested ones")
        return jagged_attention(query, key, value, score, is_causal, window_size, impl, return_support)
    visibility = Visibility(is_causal, window_size, query_positions, key_lengths, key_mask, block_mask)
    if isinstance(key_summary, KeySummaries):
        rounded = key_summary.sizes, key_summary.rounded_keys
        return attend(query, key, value, score, visibility, impl, return_support, None, rounded)
    return attend(query, key, value, score, visibility, impl, return_support, key_summary)


@overload
def entmax_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    alpha: float | Tensor = ..., alpha_range: tuple[float, float] | None = ..., is_causal: bool = ...,
    scale: float | Tensor | None = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    query_positions: Tensor | None = ..., impl: Impl = ..., return_support: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def entmax_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    alpha: float | Tensor = ..., alpha_range: tuple[float, float] | None = ..., is_causal: bool = ...,
    scale: float | Tensor | None = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    query_positions: Tensor | None = ..., impl: Impl = ..., return_support: Literal[True],
) -> tuple[Tensor, Support]: ...  # fmt: skip


@overload
def entmax_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    alpha: float | Tensor = ..., alpha_range: tuple[float, float] | None = ..., is_causal: bool = ...,
    scale: float | Tensor | None = ..., window_size: tuple[int, int] = ..., softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    query_positions: Tensor | None = ..., impl: Impl = ..., return_support: bool,
) -> Tensor | tuple[Tensor, Support]: ...  # fmt: skip


def entmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    alpha: float | Tensor = 1.5,
    alpha_range: tuple[float, float] | None = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    query_positions: Tensor | None = None,
    impl: Impl = "auto",
    return_support: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Support]:
    """Entmax attention over packed sequences, each of which attends to itself only: ``torch.nn.attention.varlen``.

    Sequence n has the query tokens cu_seq_q[n] to cu_seq_q[n + 1] and the key tokens cu_seq_k[n] to cu_seq_k[n + 1];
    both may be empty. Tokens past the last boundary get output 0 and gradient 0; like all values, theirs must be
    finite. With the kernels nothing is copied (but heads that are not aligned) and nothing waits for the device. See
    :func:`entmax_attention` for the mathematics and for all options that are not listed here.

    Args:
        query: (query tokens, heads, head size).
        key: (key tokens, key heads, head size).
        value: (key tokens, key heads, value size).
        cu_seq_q: (sequences + 1,) int32 or int64, from 0 upwards, on the device of the query.
        cu_seq_k: likewise for keys; None, or the same tensor, where queries and keys have the same boundaries.
        max_q, max_k: at least the lengths of the longest sequence. They bound the memory that is set aside.
        is_causal: within its sequence, the last query sees the last key. ``window_size=(-1, 0)`` says the same.
        alibi_slopes: (heads,).
        query_positions: (query tokens,), the position of each query within its sequence of keys.

    Returns:
        (query tokens, heads, value size), contiguous where the query is; a ``Support`` of all tokens, without a batch.

    Raises:
        TypeError, ValueError: as :func:`entmax_attention`; ValueError for boundaries that fall, exceed the tokens or
            the longest lengths. On CUDA, where reading them would wait for the device, that is a device-side assertion.
    """
    if unknown:
        check_keywords(entmax_attention_varlen, unknown, OF_VARLEN)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        require_dense(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (tokens, heads, dim), got {tuple(tensor.shape)}")
    if not isinstance(cu_seq_q, Tensor):
        raise TypeError(f"cu_seq_q must be a torch.Tensor, got {type(cu_seq_q).__name__}")
    alpha = alpha if alpha_range is None else within_range(alpha, alpha_range)
    score = ScoreOptions(alpha, scale, softcap, alibi_slopes)
    boundaries = cu_seq_q, cu_seq_q if cu_seq_k is None else cu_seq_k
    visibility = Visibility(is_causal, window_size, query_positions, None, None, None, *boundaries, max_q, max_k)
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    result = attend(query, key, value, score, visibility, impl, return_support)
    if isinstance(result, Tensor):
        return result.squeeze(0).transpose(0, 1)
    output, support = result
    return output.squeeze(0).transpose(0, 1), without_batch(support)


def without_batch(support: Support) -> Support:
    """Of packed sequences, which are one batch row."""
    return Support._make(field.squeeze(0) if isinstance(field, Tensor) else field for field in support)


def jagged_attention(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, is_causal: bool, window_size: tuple[int, int],
    impl: Impl, return_support: bool,
) -> Tensor | tuple[Tensor, Support]:  # fmt: skip
    """Nested tensors (batch, heads, ragged length, dim), through their values (heads, tokens, dim) and offsets."""
    queries, keys, values = checked_jagged("query", query), checked_jagged("key", key), checked_jagged("value", value)
    check_same_offsets(keys, values)
    is_shared = key.shape[2] == query.shape[2]  # one ragged dimension
    boundaries = queries.offsets(), (queries if is_shared else keys).offsets()
    sequences = [offsets.shape[0] - 1 for offsets in boundaries]
    if sequences[0] != sequences[1]:
        raise ValueError("query and key must have the same number of sequences, got {} and {}".format(*sequences))
    longest = longest_sequence(queries), longest_sequence(keys)
    visibility = Visibility(is_causal, window_size, None, None, None, None, *boundaries, *longest)
    query, key, value = (tensor.values().unsqueeze(0) for tensor in (queries, keys, values))
    result = attend(query, key, value, score, visibility, impl, return_support)
    if isinstance(result, Tensor):
        return jagged_like(queries, result.squeeze(0))
    output, support = result
    return jagged_like(queries, output.squeeze(0)), without_batch(support)


def checked_jagged(name: str, tensor: Tensor) -> "NestedTensor":
    """A jagged nested tensor (batch, heads, ragged length, dim)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not is_jagged(tensor, ragged=2) or tensor.dim() != 4:
        got = "another nested tensor" if tensor.is_nested else f"a tensor of shape {tuple(tensor.shape)}"
        raise ValueError(
            f"{name} must be a jagged nested tensor (batch, heads, ragged length, dim) without holes, as the other "
            f"inputs are, got {got}"
        )
    return tensor


def check_same_offsets(keys: "NestedTensor", values: "NestedTensor") -> None:
    """Each sequence has as many values as keys. On a GPU, where reading the offsets would wait, that is asserted."""
    if values.shape[2] == keys.shape[2]:  # one ragged dimension
        return
    of_keys, of_values = keys.offsets(), values.offsets()
    message = "value must have the sequence lengths of key"
    if of_keys.shape != of_values.shape:
        raise ValueError(f"{message}, got {of_values.shape[0] - 1} sequences and {of_keys.shape[0] - 1}")
    is_same = (of_keys == of_values).all()
    if of_keys.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(is_same, message)
    elif not is_same:
        raise ValueError(f"{message}, {of_keys.diff().tolist()}, got {of_values.diff().tolist()}")


def summarise_keys(key: Tensor, *, value_size: int | None = None, impl: Impl = "auto") -> KeySummary:
    """The summary of blocks of keys that ``entmax_attention(key_summary=...)`` takes.

    Many calls that attend to the same keys, as in generation, need to read all of them for their summary only once.

    Args:
        key: (batch, key heads, key length, head size); float16, bfloat16, float32 or float64.
        value_size: head size of the values of those calls; default that of the keys.
        impl: as for :func:`flash_entmax.entmax_attention`, and the same as that of those calls.

    Returns:
        A :class:`KeySummary`, in the dtype of autocast where that is on. It is right for these keys as they are now:
        where they change, make another one.

    Raises:
        TypeError, ValueError: a key of another kind, and sizes or ``impl`` out of range.
    """
    (key,) = as_autocast(key)
    check_keys(key, value_size)
    value_size = key.shape[-1] if value_size is None else value_size
    backend = choose(key.dtype, key.device, impl)
    return KeySummary(*summarise(key.detach(), value_size, backend))
