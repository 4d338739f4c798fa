"""Attention as a recurrence in time: which keys a query's state took in as they arrived, and which it let go of."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .backends.reference import entmax_rows
from .core.call import ScoreOptions
from .core.checks import is_number, typed
from .core.intervals import UNLIMITED
from .core.modes import as_given
from .core.visibility import Visibility
from .linear_attention import checked, scores_in_z

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Writes(NamedTuple):
    """What became of each key, for a query to which the keys arrive one after the other.

    A key *writes* where it is in the support of the keys up to itself: where its z is above the tau before it. It is
    *evicted* by the first later key that lifts tau to its z or above. It never comes back, since tau never falls.

    Attributes:
        z: (batch, heads, query length, key length) float64, ``(alpha - 1) * score``; -inf where the key is hidden.
        tau: of this shape, float64: the threshold once this key has arrived; -inf before the first visible key.
        wrote: of this shape, bool: the key wrote to the state of the query when it arrived.
        evicted_by: of this shape, int64: the number of the key that evicted it; -1 where it is still there at the end,
            or never wrote.
    """

    z: Tensor
    tau: Tensor
    wrote: Tensor
    evicted_by: Tensor

    @property
    def evicted(self) -> Tensor:
        """(batch, heads, query length, key length) bool: the key wrote, and is not in the support at the end."""
        return self.evicted_by >= 0

    @property
    def support(self) -> Tensor:
        """(batch, heads, query length, key length) bool: the support at the end, which is that of attention."""
        return self.wrote & ~self.evicted & ~self.tau[..., -1:].isnan()

    @property
    def size(self) -> Tensor:
        """(batch, heads, query length, key length) int64: keys in the state once this key has arrived."""
        left = torch.zeros_like(self.evicted_by)
        left = left.scatter_add(-1, self.evicted_by.clamp_min(0), self.evicted.long())
        return (self.wrote.long() - left).cumsum(-1)


def writes(
    query: Tensor,
    key: Tensor,
    alpha: float = 1.5,
    *,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    alibi_slopes: Tensor | None = None,
    query_positions: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    block_mask: "BlockMask | None" = None,
) -> Writes:
    """Which keys a recurrent model would write to its state for each query, and evict, to end with entmax attention.

    The keys that a query sees arrive in order, and the query stays. The state holds the support of the keys so far.
    Key t writes exactly if ``z_t > tau``, the threshold before it; tau then rises, and keys with ``z <= tau`` are
    evicted. docs/math.md has the proof. The gate depends on the query: another query keeps other keys.

    This is for analysis, and slow: a step for each key, and at each step a threshold of up to key length scores for
    each query to which the key writes. Memory is some ten times queries * keys * 8 bytes. Pass few queries of a long
    sequence, with ``query_positions``.

    Args:
        query: (batch, heads, query length, head size), of the dtypes of ``entmax_attention``; no gradient.
        key: (batch, key heads, key length, head size).
        alpha: above 1, up to 2.
        is_causal, scale, window_size, alibi_slopes, query_positions, key_lengths, key_mask, block_mask: as for
            :func:`flash_entmax.entmax_attention`.

    Returns:
        :class:`Writes`, computed in float64. From the first visible score of NaN or inf on, the tau of a row is NaN and
        nothing is written or evicted. A score of -inf never writes.

    Raises:
        TypeError, ValueError: as ``entmax_attention``, and for an alpha that is softmax or a tensor.
    """
    if not is_number(alpha):
        raise TypeError(f"alpha must be a number above 1 and up to 2, got {typed(alpha)}")
    if alpha == 1.0:
        raise ValueError("alpha must be above 1 and up to 2, got 1: with softmax every key writes, and none is evicted")
    score = ScoreOptions(alpha, scale, 0.0, alibi_slopes)
    visibility = Visibility(is_causal, window_size, query_positions, key_lengths, key_mask, block_mask)
    query, key, _ = checked(query, key, key, score, visibility)
    with torch.no_grad(), as_given(query):
        z, visible, _ = scores_in_z(query, key, score, visibility)
        tau, wrote, evicted_by = (rows.view_as(z) for rows in recurrence(z.flatten(0, 2), visible.flatten(0, 2), alpha))
    return Writes(z, tau, wrote, evicted_by)


def recurrence(z: Tensor, visible: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """tau, wrote and evicted_by of rows (rows, key length). The state of a row is a mark for each key in it."""
    taus, evicted_by = torch.empty_like(z), torch.full_like(z, -1, dtype=torch.int64)
    wrote, state = torch.zeros_like(visible), torch.zeros_like(visible)
    tau = torch.full_like(z.sum(-1), -torch.inf)
    is_spoiled = visible & ~(z < torch.inf)
    for t in range(z.shape[-1]):
        tau = tau.masked_fill(is_spoiled[:, t], torch.nan)
        writing = (z[:, t] > tau).nonzero().flatten()  # no score is above NaN
        if writing.numel():
            before, known = state[writing, : t + 1], z[writing, : t + 1]
            before[:, t] = True
            probability, maximum, offset = entmax_rows(known.masked_fill(~before, -torch.inf), alpha)
            after = probability > 0
            wrote[writing, t] = after[:, t]
            left = before & ~after
            left[:, t] = False
            evicted_by[writing, : t + 1] = torch.where(left, t, evicted_by[writing, : t + 1])
            state[writing, : t + 1] = after
            tau[writing] = maximum - offset
        taus[:, t] = tau
    return taus, wrote, evicted_by
