"""Decoding with a cache of keys and values whose parts lie on the ranks of a group.

Keys and values stay where they are. A row's threshold needs its maximum, and then F and sum u at each of Newton's
steps: a few numbers from each rank. The outputs of the parts are added.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..backends import BACKENDS, Impl, choose
from ..core.alphas import check_alphas
from ..core.call import Problem, ScoreOptions
from ..core.checks import check_flag, checked_inputs, require_dense, typed
from ..core.intervals import FURTHEST, UNLIMITED, check_lengths
from ..core.modes import as_given, is_recorded
from ..core.tensors import row_dtype
from ..core.threshold import MAX_STEPS, newton_step, tolerance
from ..core.visibility import Visibility
from ..operators.attention import tile_of
from .exchange import gathered, summed
from .ranks import Ranks, agreed, all_gather, described, outside_of_graphs


@outside_of_graphs
def decode_sharded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: ProcessGroup | DeviceMesh,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    query_positions: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    first_key: int | None = None,
    impl: Impl = "auto",
    check_ranks: bool = True,
) -> Tensor:
    """Attention of the same few queries, on every rank, to keys and values whose parts lie on the ranks.

    Keys and values do not travel. It has no gradient. Each of the Newton steps to the threshold is one exchange of two
    numbers for each row, and waits for it.

    Args:
        query: (batch, heads, query length, head size), the same on all ranks.
        key: (batch, key heads, local key length, head size), this rank's part.
        value: (batch, key heads, local key length, value size).
        group: a ``ProcessGroup`` or a one-dimensional ``DeviceMesh``.
        alpha: a number above 1, up to 2, or a tensor in [1.01, 2]. Softmax, alpha = 1, has no threshold, and is
            refused.
        is_causal, scale, window_size, softcap, alibi_slopes: as for :func:`flash_entmax.entmax_attention`, in
            positions of the whole cache.
        query_positions: the position of the first query, or that of each one, (query length,) or (batch, query length);
            by default the last query stands at the last key of the last rank.
        key_lengths: (batch,) int32 or int64, the same on all ranks: of the whole cache, only so many keys exist.
        key_mask: (batch, local key length) bool, this rank's part: True where the key may be seen.
        first_key: the position of this rank's first key. By default the parts are of one length, and follow each other
            in the order of the ranks. With it, parts may have any length and must not overlap, and ``query_positions``
            must be given.
        impl: as for ``entmax_attention``, but for ``"reference"``.
        check_ranks: as for :func:`context_parallel_attention`.

    Returns:
        (batch, heads, query length, value size) in the dtype of the inputs: the same bits on every rank, and in
        repeated runs.

    Raises:
        TypeError, ValueError: as for :func:`context_parallel_attention`, and ValueError where a gradient is asked for.
        RuntimeError: of the group, where a rank does not take part within the group's timeout.
    """
    ranks = Ranks.of(group)
    check_flag("check_ranks", check_ranks)

    def prepare() -> tuple[Tensor, Tensor, Tensor, ScoreOptions, Visibility, str]:
        score = ScoreOptions(alpha, scale, softcap, alibi_slopes)
        visibility = Visibility(is_causal, window_size, query_positions, key_lengths, key_mask)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            require_dense(name, tensor)
        check_first_key(first_key, query_positions)
        inputs = checked_inputs(query, key, value, score, visibility, parts=ranks.size)
        if isinstance(alpha, Tensor):
            check_alphas(alpha)
        check_decoding((*inputs, alpha, scale, alibi_slopes), score)
        if key_lengths is not None:
            check_lengths(key_lengths, FURTHEST if first_key is not None else inputs[1].shape[2] * ranks.size)
        return *inputs, score, visibility, choose(inputs[0].dtype, inputs[0].device, impl)

    def describe(prepared: tuple) -> dict[str, str]:
        query, key, value, score, *_ = prepared
        parts = {"query": query, "key heads": key.shape[1], "value size": value.shape[3]}
        parts |= {"key length": key.shape[2]} if first_key is None else {}
        shared = score._asdict() | {
            "is_causal": is_causal, "window_size": tuple(window_size), "query_positions": query_positions,
            "key_lengths": key_lengths, "impl": impl, "first_key": "given" if first_key is not None else "none",
        }  # fmt: skip
        texts = {name: described(part, is_shared=False) for name, part in parts.items()}
        texts |= {name: described(option, is_shared=True) for name, option in shared.items()}
        return {"function": "decode_sharded"} | texts

    query, key, value, score, visibility, backend = agreed(ranks, prepare, describe, check_ranks)
    if first_key is not None and check_ranks and not torch.compiler.is_compiling():
        refuse_overlap(ranks, first_key, key.shape[2])
    with torch.no_grad(), as_given(query):
        problem = own_problem(query, key, value, score, visibility, backend, first_key, ranks)
        return solved(problem, query, key, value, backend, ranks)


def check_decoding(tensors: tuple, score: ScoreOptions) -> None:
    if is_recorded(tensors):
        raise ValueError("decode_sharded has no gradient: call it under torch.no_grad()")
    if score.is_softmax():
        raise ValueError("alpha must be above 1 here, got 1: softmax has no threshold; use context_parallel_attention")


def check_first_key(first_key: object, query_positions: object) -> None:
    if first_key is None:
        return
    if not isinstance(first_key, int) or isinstance(first_key, bool):
        raise TypeError(f"first_key must be an integer or None, got {typed(first_key)}")
    if not 0 <= first_key <= FURTHEST:
        raise ValueError(f"first_key must be from 0 to 2^30, got {first_key}")
    if query_positions is None:
        raise ValueError(f"first_key={first_key} needs query_positions: where the whole cache ends is not known")


def refuse_overlap(ranks: Ranks, first_key: int, size: int) -> None:
    """A key that two ranks hold would count twice. All ranks see the same parts, and raise the same error."""
    part = torch.tensor([first_key, first_key + size], device=ranks.device())
    parts = part.new_empty(2 * ranks.size)
    all_gather(parts, part, group=ranks.group)
    held = sorted((first, end, rank) for rank, (first, end) in enumerate(parts.view(-1, 2).tolist()) if first < end)
    for (first, end, rank), (next_first, next_end, next_rank) in pairwise(held):
        if next_first < end:
            raise ValueError(
                f"the keys of two ranks must not overlap, got first_key={first} to {end - 1} on rank {rank} and "
                f"first_key={next_first} to {next_end - 1} on rank {next_rank}"
            )


def own_problem(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, backend: str,
    first_key: int | None, ranks: Ranks,
) -> Problem:  # fmt: skip
    """The problem of this rank's keys, which count from its first one."""
    size = key.shape[2]
    first, end = (ranks.rank * size, ranks.size * size) if first_key is None else (first_key, first_key + size)
    score = score.lowered(query.shape, row_dtype(query), query.device)
    whole_value = torch.Size((*value.shape[:2], end, value.shape[3]))
    lengths = None if visibility.key_lengths is None else visibility.key_lengths.clamp(max=end)
    limits = replace(visibility, key_mask=None, key_lengths=lengths).lowered(query, end, None)
    whole = Problem.of(query.shape, whole_value, score, limits)
    start, stop, position = (whole.intervals(query.device) - first).unbind(1)
    intervals = torch.stack((start.clamp(0, size), stop.clamp(0, size), position), 1)
    own = Visibility(key_mask=visibility.key_mask, known_intervals=intervals)
    return Problem.of(query.shape, value.shape, score, own.lowered(query, size, tile_of(backend, query, value)))


def solved(problem: Problem, query: Tensor, key: Tensor, value: Tensor, backend: str, ranks: Ranks) -> Tensor:
    """The output, from the maximum, the offset and the sums of all parts."""
    stages = BACKENDS[backend]
    maxima = gathered(stages.row_maxima(problem, query, key), ranks)
    is_empty = maxima == torch.inf  # the part has no key that the row sees
    maximum = maxima.masked_fill(is_empty, -torch.inf).amax(0).masked_fill(is_empty.all(0), torch.inf)
    alpha = problem.score.alpha
    alpha = alpha.view(-1, 1) if isinstance(alpha, Tensor) else alpha
    offset = torch.ones_like(maximum)
    for _ in range(MAX_STEPS):
        sums = torch.stack(stages.sums_at(problem, query, key, maximum, offset))
        total, weight = summed(gathered(sums, ranks))
        stepped = newton_step(offset, total, weight, alpha)
        stays = (total - 1 <= tolerance(offset)) | (stepped >= offset)  # a row that sees no key has F = 0
        if (stays | offset.isnan()).all():
            break
        offset = torch.where(stays, offset, stepped)
    parts = gathered(stages.output_at(problem, query, key, value, maximum, offset), ranks)
    return summed(parts).to(query.dtype)
