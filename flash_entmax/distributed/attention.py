"""Context parallelism: attention over a sequence whose parts lie on the ranks of a group.

    gather  every rank gets all keys and values, and computes its own queries against them
    heads   every rank gets the whole sequence of some heads, computes these, and gives the outputs back

The threshold of entmax needs all keys of a row at once. So partial outputs cannot be merged on the way, as ring
attention merges those of softmax.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..backends import Impl, choose
from ..core.alphas import ADVICE, check_alphas, within_range
from ..core.call import ScoreOptions
from ..core.checks import check_boundaries, check_flag, check_index, checked_inputs, require_dense, said, typed
from ..core.intervals import UNLIMITED, check_lengths
from ..core.visibility import Visibility
from ..operators.kept_calls import attend
from .exchange import Arriving, Exchange, gather, gathered, start_gathering, sum_gradients
from .layout import Layout, check_layout, check_length, chunks, joined, local_positions
from .prefixes import prefixes
from .ranks import Ranks, agreed, described

Method = Literal["gather", "heads"]


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: ProcessGroup | DeviceMesh,
    method: Method = "gather",
    layout: Layout = "balanced",
    alpha: float | Tensor = 1.5,
    alpha_range: tuple[float, float] | None = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seq: Tensor | None = None,
    impl: Impl = "auto",
    heads_at_a_time: int | None = None,
    sum_parameter_gradients: bool = True,
    check_ranks: bool = True,
) -> Tensor:
    """:func:`flash_entmax.entmax_attention` over a sequence that is sharded over the ranks of a group.

    Every rank of the group calls it with its own part of the sequence, as :func:`shard` cuts it, and gets its own part
    of the output. The gradients are those of the sum of all ranks' losses. Every rank must take the backward pass as
    well. docs/scale.md has the memory and the bytes of both methods, and how to choose.

    Args:
        query: (batch, heads, local length, head size), this rank's part, of one shape on all ranks.
        key: (batch, key heads, local length, head size).
        value: (batch, key heads, local length, value size).
        group: a ``ProcessGroup``, of gloo for CPUs or NCCL for GPUs, or a one-dimensional ``DeviceMesh``.
        method: ``"gather"`` sends all keys and values to every rank, for any number of heads. ``"heads"`` sends every
            rank the whole sequence of its share of the heads; the heads and the key heads must be multiples of the
            number of ranks.
        layout: ``"balanced"`` cuts the sequence into two chunks for each rank: rank r of n has the chunks r and
            2 n - 1 - r, so that a causal mask gives all ranks as much to do. The local length must be even.
            ``"contiguous"`` cuts it into one chunk for each rank. Lengths that do not divide are refused: pad them, and
            hide the padding with ``key_lengths``.
        alpha, alpha_range, is_causal, scale, window_size, softcap, impl: as for ``entmax_attention``, in positions of
            the whole sequence. Tensors are the same on all ranks.
        alibi_slopes: (heads,) or (batch, heads), the same on all ranks.
        key_lengths: (batch,) int32 or int64, the same on all ranks: of each whole sequence, only so many keys exist.
        key_mask: (batch, local length) bool, this rank's part: True where the key may be seen.
        cu_seq: (sequences + 1,) int32 or int64, the same on all ranks: the boundaries of packed sequences in the
            whole sequence, of a batch of 1, for queries and keys. They need not be those of the parts. Tokens past the
            last boundary get output 0. Not together with ``key_lengths``.
        heads_at_a_time: with ``"gather"``, so many key heads are gathered at a time, while those before are computed;
            by default, and with more than there are, all at once. In a graph of ``torch.compile``, Inductor decides
            when they travel.
        sum_parameter_gradients: the gradient of a tensor ``alpha``, ``scale`` or ``alibi_slopes`` is summed over the
            ranks, always in the same order. With False each rank keeps its own share, for parameters whose gradients
            FSDP or DDP reduces over the same ranks, together with those of all other weights.
        check_ranks: compare the calls of all ranks before anything else is exchanged: shapes, dtypes and options, and
            the numbers of tensors on a CPU. An error of one rank, or a difference, is then an error on all of them. It
            takes one exchange of 32 bytes, and waits for it; a group with a backend for CPUs (``"cpu:gloo,cuda:nccl"``)
            does not wait for a GPU. With False, calls that differ give wrong results or wait until the group's timeout.
            In a graph of ``torch.compile`` nothing is compared, whatever this is.

    Returns:
        This rank's part of the output, (batch, heads, local length, value size). Repeated runs agree bit for bit.

    Raises:
        TypeError: an input that is not a floating-point tensor, mixed dtypes, or an option of the wrong type.
        ValueError: shapes, devices or options that do not fit, that exclude each other, or that differ between ranks.
        RuntimeError: of the group, where a rank does not take part within the group's timeout.
    """
    ranks = Ranks.of(group)
    check_flag("check_ranks", check_ranks)

    def prepare() -> Call:
        visibility = Visibility(is_causal, window_size, None, key_lengths, key_mask, None, cu_seq, cu_seq)
        own_alpha = alpha if alpha_range is None else within_range(alpha, alpha_range)
        score = ScoreOptions(own_alpha, scale, softcap, alibi_slopes)
        call = Call((query, key, value), score, visibility, method, layout, impl, heads_at_a_time, ranks)
        check_flag("sum_parameter_gradients", sum_parameter_gradients)
        call = call.checked()
        if isinstance(own_alpha, Tensor) and not torch.compiler.is_compiling():
            check_alphas(own_alpha, ADVICE)  # in a graph the operator of attention does so
        return call

    def describe(call: Call) -> dict[str, str]:
        return call.description() | {"sum_parameter_gradients": repr(sum_parameter_gradients)}

    call = agreed(ranks, prepare, describe, check_ranks)
    if sum_parameter_gradients:
        call = call.with_summed_gradients()
    return by_gather(call) if method == "gather" else by_heads(call)


@dataclass(frozen=True)
class Call:
    """One rank's call: local inputs, and options of the whole sequence."""

    inputs: tuple[Tensor, Tensor, Tensor]
    score: ScoreOptions
    visibility: Visibility  # the key_mask is that of the local keys
    method: Method
    layout: Layout
    impl: Impl
    heads_at_a_time: int | None
    ranks: Ranks
    intervals: Tensor | None = None  # (batch, 3, length) of all queries, where sequences are packed

    @property
    def length(self) -> int:
        """Of the whole sequence."""
        return self.inputs[0].shape[2] * self.ranks.size

    def checked(self) -> "Call":
        """The call with inputs as autocast wants them, after every refusal that one rank can decide by itself."""
        check_method(self.method)
        check_layout(self.layout)
        for name, tensor in zip(("query", "key", "value"), self.inputs, strict=True):
            require_dense(name, tensor)
        of_parts = replace(self.visibility, cu_seq_q=None, cu_seq_k=None)  # boundaries are those of the whole sequence
        query, key, value = checked_inputs(*self.inputs, self.score, of_parts)
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"query and key must have one local length, got {query.shape[2]} and {key.shape[2]}")
        check_length(query.shape[2] * self.ranks.size, self.ranks.size, self.layout)
        if self.visibility.key_lengths is not None:
            check_lengths(self.visibility.key_lengths, query.shape[2] * self.ranks.size)
        choose(query.dtype, query.device, self.impl, others=("reference",))
        if self.score.is_softmax() and self.score.softcap:
            raise ValueError("softcap with alpha=1 (softmax) is not computed here: use alpha above 1")
        check_heads(self.method, query.shape[1], key.shape[1], self.ranks.size)
        check_heads_at_a_time(self.heads_at_a_time, self.method)
        call = replace(self, inputs=(query, key, value))
        return call if self.visibility.cu_seq_q is None else replace(call, intervals=call.packed_intervals())

    def packed_intervals(self) -> Tensor:
        """Of all queries of the whole sequence."""
        query, visibility = self.inputs[0], self.visibility
        if query.shape[0] != 1:
            raise ValueError(f"cu_seq packs the sequences of a batch of 1, got a batch of {query.shape[0]}")
        if visibility.key_lengths is not None:
            raise ValueError("cu_seq and key_lengths exclude each other: let the last boundary end the sequences")
        check_index("cu_seq", visibility.cu_seq_q, query, None)
        check_boundaries(query, visibility)
        whole = query[:, :1, :1].expand(-1, -1, self.length, -1)
        intervals = replace(visibility, max_q=self.length, max_k=self.length).intervals(whole, self.length)
        assert intervals is not None  # boundaries are no plain mask
        return intervals

    def description(self) -> dict[str, str]:
        """What must be the same on all ranks."""
        shared = self.score._asdict() | {
            "is_causal": self.visibility.is_causal,
            "window_size": tuple(self.visibility.window_size),
            "key_lengths": self.visibility.key_lengths,
            "cu_seq": self.visibility.cu_seq_q,
            "method": self.method,
            "layout": self.layout,
            "impl": self.impl,
            "heads_at_a_time": self.heads_at_a_time,
        }
        local = dict(zip(("query", "key", "value"), self.inputs, strict=True)) | {"key_mask": self.visibility.key_mask}
        texts = {name: described(value, is_shared=False) for name, value in local.items()}
        texts |= {name: described(value, is_shared=True) for name, value in shared.items()}
        return {"function": "context_parallel_attention"} | texts

    def with_summed_gradients(self) -> "Call":
        alpha, scale, softcap, slopes = self.score
        alpha, scale, slopes = (sum_gradients(parameter, self.ranks) for parameter in (alpha, scale, slopes))
        return replace(self, score=ScoreOptions(alpha, scale, softcap, slopes))

    def whole_key_mask(self) -> Tensor | None:
        """(batch, whole length) bool."""
        mask = self.visibility.key_mask
        return None if mask is None else joined(gathered(mask, self.ranks), 1, self.layout)

    def visibility_of_all(self) -> Visibility:
        """What the queries of the whole sequence see."""
        if self.intervals is None:
            return replace(self.visibility, key_mask=self.whole_key_mask())
        return Visibility(key_mask=self.whole_key_mask(), known_intervals=self.intervals)

    def own_parts(self) -> "list[OwnPart]":
        """This rank's queries, in as many calls as there are intervals of positions, where positions matter.

        Each chunk of queries then stands at the end of the keys that it may see, as in a call without positions. So
        causal attention needs no interval of keys for each query, and windows bound the lists of a tile.
        """
        mask, length = self.whole_key_mask(), self.length
        if self.intervals is not None:
            positions = local_positions(length, self.ranks, self.layout, self.inputs[0].device)
            intervals = self.intervals[:, :, positions].contiguous()
            return [OwnPart(slice(None), length, Visibility(key_mask=mask, known_intervals=intervals))]
        if self.visibility.window == (UNLIMITED, UNLIMITED) and self.score.alibi_slopes is None:
            return [OwnPart(slice(None), length, replace(self.visibility, key_mask=mask))]
        own = chunks(self.ranks.size, self.layout)[self.ranks.rank]
        size = self.inputs[0].shape[2] // len(own)
        return [self.own_part(place * size, number * size, size, mask) for place, number in enumerate(own)]

    def own_part(self, place: int, first: int, size: int, mask: Tensor | None) -> "OwnPart":
        """The `size` local queries from `place` on, which stand from position `first` on."""
        right, last = self.visibility.window[1], first + size
        keys = self.length if right == UNLIMITED else min(self.length, last + right)
        lengths = self.visibility.key_lengths
        visibility = replace(
            self.visibility,
            query_positions=None if keys == last and lengths is None else first,
            key_lengths=None if lengths is None else lengths.clamp(max=keys),
            key_mask=None if mask is None else mask[:, :keys],
        )
        return OwnPart(slice(place, place + size), keys, visibility)


class OwnPart(NamedTuple):
    """Some local queries, and what they see: of all keys the first `keys` at most."""

    queries: slice
    keys: int
    visibility: Visibility


def check_method(method: object) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method must be {' or '.join(map(repr, get_args(Method)))}, got {said(method)}")


def check_heads(method: Method, heads: int, key_heads: int, size: int) -> None:
    if method == "heads" and (heads % size or key_heads % size):
        raise ValueError(
            f"method 'heads' shares heads among ranks: heads and key heads must be multiples of {size}, the number of "
            f"ranks, got {heads} and {key_heads}; method 'gather' takes any"
        )


def check_heads_at_a_time(heads_at_a_time: object, method: Method) -> None:
    if heads_at_a_time is None:
        return
    if not isinstance(heads_at_a_time, int) or isinstance(heads_at_a_time, bool):
        raise TypeError(f"heads_at_a_time must be an integer or None, got {typed(heads_at_a_time)}")
    if method != "gather":
        raise ValueError(f"heads_at_a_time is for method 'gather', got method {method!r}")
    if heads_at_a_time < 1:
        raise ValueError(f"heads_at_a_time must be at least 1, got {heads_at_a_time}")


def by_gather(call: Call) -> Tensor:
    """All keys and values come to the own queries. While some heads are computed, the next ones travel."""
    (query, key, value), ranks, layout = call.inputs, call.ranks, call.layout
    own_parts = call.own_parts()
    key_heads, shared = key.shape[1], query.shape[1] // max(key.shape[1], 1)
    step = min(call.heads_at_a_time or key_heads, key_heads) or 1
    parts = [slice(first, min(first + step, key_heads)) for first in range(0, max(key_heads, 1), step)]
    outputs, arriving = [], start(call, parts[0])
    for own, following in zip(parts, [*parts[1:], None], strict=True):
        tensors = key[:, own], value[:, own]
        ready, arriving = arriving, [] if following is None else start(call, following)
        whole_key, whole_value = (
            gather(tensor, 2, ranks, layout, one) for tensor, one in zip(tensors, ready, strict=True)
        )
        del ready  # the parts are in their order, and need no memory any more
        heads = slice(shared * own.start, shared * own.stop)
        score = of_heads(call.score, heads)
        outputs.append(output_of_parts(query[:, heads], whole_key, whole_value, score, own_parts, call.impl))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def start(call: Call, heads: slice) -> list[Arriving | None]:
    """These heads of keys and of values start to travel. None for each in a graph, where `gather` does it all."""
    if torch.compiler.is_compiling():
        return [None, None]
    return [start_gathering(tensor[:, heads], call.ranks) for tensor in call.inputs[1:]]


def by_heads(call: Call) -> Tensor:
    """The whole sequence of some heads comes to every rank, and their outputs go back."""
    ranks, layout = call.ranks, call.layout
    visibility = call.visibility_of_all()
    share = call.inputs[0].shape[1] // ranks.size
    score = of_heads(call.score, slice(ranks.rank * share, (ranks.rank + 1) * share))
    query, key, value = (Exchange.apply(tensor, True, ranks, layout) for tensor in call.inputs)
    output = output_of(query, key, value, score, visibility, call.impl)
    return Exchange.apply(output, False, ranks, layout)


def output_of_parts(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, parts: list[OwnPart], impl: Impl
) -> Tensor:
    lengths = tuple(part.keys for part in parts)
    outputs = [
        output_of(query[:, :, part.queries], own_key, own_value, score, part.visibility, impl)
        for part, own_key, own_value in zip(parts, prefixes(key, lengths), prefixes(value, lengths), strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def output_of(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, impl: Impl
) -> Tensor:
    """The call that one process makes."""
    output = attend(query, key, value, score, visibility, impl, False)
    assert isinstance(output, Tensor)
    return output


def of_heads(score: ScoreOptions, heads: slice) -> ScoreOptions:
    """The options of some heads."""
    return ScoreOptions._make(
        option[..., heads] if isinstance(option, Tensor) and option.dim() else option for option in score
    )
